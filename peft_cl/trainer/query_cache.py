"""Query features of a data set, computed once where they are the same each time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..backbones.reading import hooks_of
from ..heads import CLS
from ..scenarios import Task
from ..tuners.base.digests import digest_of_weights
from ..tuners.base.model import PromptPoolModel
from .examples import has_transform
from .tensor_files import TensorFiles


#: Of a configuration of a backbone: names of it and of classes, which a task changes, and no feature depends on. The
#: number format is read from the weights: a model that is saved notes it in its configuration.
NO_PART_OF_IT = (
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "transformers_version",
)


class QueryCache:
    """Query features of tasks, kept in memory for the length of a run, and in files for later runs where asked to.

    The backbone is frozen and the query pass runs in evaluation mode, so an image that is not augmented has the same
    feature in every epoch and every evaluation. Test images qualify; training images only without augmentation, and
    nothing does if the backbone is trained, the pool has no use for a query, or the data set itself transforms its
    images (`with_transform`), which may be another way each time.

    In files, queries depend on the data's fingerprint, the image processor, every weight and module of the backbone,
    number formats, device and versions.

    Args:
        training_images: whether training images are the same each time.
        image_column: column of the images.
        folder: where files are kept; None: nowhere.
        everywhere: whether something is true on every process: all of them compute, or none.
        **settings: what the features depend on beside data and backbone, in types that JSON knows.
    """

    def __init__(
        self,
        training_images: bool,
        image_column: str,
        folder: str | Path | None = None,
        everywhere: Callable[[bool], bool] = bool,
        **settings: Any,
    ):
        self.training_images = training_images
        self.files = None if folder is None else TensorFiles(folder, "queries", image_column)
        self.everywhere, self.settings = everywhere, settings
        # By identity, with the data set itself, so that no other can take its place while its queries are kept.
        self._queries: dict[int, tuple[Dataset, torch.Tensor]] = {}
        self._kept_for: tuple[dict[str, Any], list[Any]] = {}, []

    def queries(
        self, tasks: Sequence[Task], split: str, tuner: PromptPoolModel, compute: Callable[[Task, str], torch.Tensor]
    ) -> torch.Tensor | None:
        """Queries of the tasks' `"train"` or `"test"` examples one after the other, (examples, D) float32, or None
        where they cannot be kept.

        Args:
            compute: the queries of a task's split, without augmentation, in order.
        """
        if not self.are_fixed(tuner) or (split == "train" and not self.training_images):
            return None
        if any(has_transform(getattr(task, split)) for task in tasks):
            return None
        self._look_at(tuner)
        return torch.cat([self._of(task, split, compute) for task in tasks])

    @staticmethod
    def are_fixed(tuner: PromptPoolModel) -> bool:
        """Whether the same pixels have the same query each time, and the pool has a use for it."""
        return not tuner.encoder.learns and (tuner.pool.needs_query or tuner.pool.query_is_feature)

    def forget(self, tasks: Sequence[Task]) -> None:
        """Drop the training queries of tasks that are learnt; their files stay."""
        for task in tasks:
            self._queries.pop(id(task.train), None)

    def _look_at(self, tuner: PromptPoolModel) -> None:
        """Drop everything if the backbone, its hooks, or what it is run in is another since: its weights are read, as
        not every way to change them leaves a trace."""
        now = self._all_settings(tuner), list(hooks_of(tuner.encoder.base_layer.modules()))
        if now != self._kept_for:
            self._queries.clear()
            self._kept_for = now

    def _of(self, task: Task, split: str, compute: Callable[[Task, str], torch.Tensor]) -> torch.Tensor:
        data = getattr(task, split)
        if id(data) not in self._queries:
            # What somebody's hooks do to the features, nothing that lasts can tell.
            settings, hooks = self._kept_for
            in_files = self.files and not hooks
            if in_files:
                queries = self.files.of(data, settings, lambda: compute(task, split), self.everywhere)
            else:
                queries = compute(task, split)
            self._queries[id(data)] = data, queries
        return self._queries[id(data)][1]

    def _all_settings(self, tuner: PromptPoolModel) -> dict[str, Any]:
        base = tuner.encoder.base_layer
        config = getattr(base, "config", tuner.model.config)  # timm's models have none of their own
        weight = next(base.parameters())
        kind = weight.device.type
        features = tuner.encoder.query_features
        layer = tuner.pool.query_layer
        return {
            **({} if layer is None else {"query_layer": layer}),
            **({} if features == CLS else {"features": str(features)}),
            **self.settings,
            "backbone": digest_of_weights(base),
            "modules": digest_of_modules(base),
            "config": {name: value for name, value in config.to_dict().items() if name not in NO_PART_OF_IT},
            "attention": config._attn_implementation,
            "dtype": str(weight.dtype),
            "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
            "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else kind,
            "threads": torch.get_num_threads(),
            "products": _precision_of_products(),
            "compiled": any(module._compiled_call_impl is not None for module in base.modules()),
        }


def _precision_of_products() -> list[Any]:
    """What float32 products are computed in. Of torch's two ways to say it the old one raises after the new one."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(products, "fp32_precision"):
        return [products.fp32_precision, convolutions.conv.fp32_precision]
    return [torch.get_float32_matmul_precision(), convolutions.allow_tf32]


def digest_of_modules(module: nn.Module) -> str:
    """A digest of what the module is made of: names, classes and their settings."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(f"{name} {type(part).__module__}.{type(part).__qualname__}({part.extra_repr()})\n".encode())
    return digest.hexdigest()
