"""What can be done with the head of an adapter without the trainer: observe, fit, go on, forget, join."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...heads import Head, LinearHead, Sizes
from ...heads.files import SUMS_FILE, load_sums, save_sums
from ...text import brief
from .config import PromptPoolConfig
from .digests import digest_in_bfloat16, digest_of_tensors, digest_of_weights
from .encoder import evaluation_mode
from .merged import merged
from .saved import file_beside


class HeadTools:
    """Methods of `PromptPoolModel` around heads that observe, such as `"lda"` and `"ridge"`."""

    @torch.no_grad()
    def features(
        self, pixel_values: torch.Tensor, query: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the active adapter's head reads of images, in evaluation mode.

        Args:
            pixel_values: (B, channels, height, width).
            query: (B, Q), the frozen model's features, where they are known.

        Returns:
            Features (B, F), and the query (B, Q) (None where there is no use for one).
        """
        with evaluation_mode(self.model), self.head.capturing() as captured:
            self.model(pixel_values=pixel_values, query=query)
        return captured[0], captured[1]

    def observe(self, pixel_values: torch.Tensor, labels: torch.Tensor, query: torch.Tensor | None = None) -> None:
        """Show training images of the current task to a head that observes, each once; then call `fit_head`.

        Args:
            pixel_values: (B, channels, height, width), without augmentation.
            labels: (B,), rows of the classes, as `model.config.label2id` has them.
            query: as `features` has it.
        """
        self.need_sums()
        features, query = self.features(pixel_values, query)
        self.head.active.observe(features, torch.as_tensor(labels), query)

    def fit_head(self, batches: Iterable[Mapping[str, Any]] = ()) -> None:
        """Compute the head from all that it has observed, and from `batches` before that.

        Args:
            batches: of the current task's training images, with `pixel_values` and `labels`: a `DataLoader`, for
                instance.

        Raises:
            ValueError: the adapter was loaded and its sums were not, or labels of no class.

        Example:
            >>> model = get_peft_model(base, LinearProbeConfig(head="lda"))    # doctest: +SKIP
            >>> model.begin_task(["cat", "dog"])                               # doctest: +SKIP
            >>> model.fit_head(loader)                                         # doctest: +SKIP
        """
        device = self.model.device
        for batch in batches:
            self.observe(batch["pixel_values"].to(device), batch["labels"], batch.get("query"))
        self.need_sums()
        self.head.active.fit()

    # ----------------------------------------------------------------------------------------------- going on

    def save_sums(self, folder: str | Path) -> Path | None:
        """Write the sums of the active adapter's head into `folder`, beside its adapter; None if it has none.

        Predicting does not need them: they are wanted to learn on (`begin_task`), to `join` and to `forget_classes`.
        """
        head = self.head.active
        return save_sums(folder, head.going_on(), self._facts_of_sums()) if head.observes and head.has_sums else None

    def load_sums(self, folder: str | Path) -> None:
        """Take up the sums that `save_sums` wrote.

        Raises:
            FileNotFoundError: there are none in `folder`.
            ValueError: the file is damaged, or of another adapter or backbone.
        """
        path = Path(folder) / SUMS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {SUMS_FILE} in {str(folder)!r}. Give the folder that the trainer or "
                "model.save_sums(folder) wrote it to."
            )
        self.head.active.go_on(load_sums(path, self._facts_of_sums()))

    def need_sums(self) -> None:
        """Have the sums of the active adapter's head: an adapter that was loaded finds them where its file lies.

        Raises:
            ValueError: they are not there.
        """
        head, config = self.head.active, self._active_config()[1]
        if head is None or head.has_sums:
            return
        file = file_beside(config.source, SUMS_FILE)
        if file is None:
            where = f" beside it in {config.source[0]!r}" if config.source else ""
            raise ValueError(
                f"The head {config.head!r} of this adapter is computed from sums over all training images, and to "
                f"learn on it needs them, but there is no {SUMS_FILE}{where}. Copy that file there from where the "
                "adapter was trained (the trainer writes it; with a loop of your own, model.save_sums(folder)), or "
                "call model.load_sums(folder)."
            )
        self.load_sums(file.parent)

    def _facts_of_sums(self) -> dict[str, Any]:
        """What sums belong to."""
        config, head = self._active_config()[1], self.head.active
        saved = ((name, value) for name, value in head.state_dict().items() if not name.startswith("training_head"))
        return {
            "head": config.head,
            "features": [config.head_features, config.head_layers],
            "classes": config.classes,
            "backbone": self.backbone_digest(),
            "adapter": digest_of_tensors(saved)[:16],
        }

    def backbone_digest(self) -> str:
        """A digest of the backbone's weights, the same in float32 and in bfloat16."""
        return digest_in_bfloat16(merged(self.encoder.base_layer))

    # ----------------------------------------------------------------------------------------------- the trained head

    def _set_training_head(self, head: Head, config: PromptPoolConfig, known: int, *, backbone_learns: bool) -> None:
        """Under a head that is computed a linear one is trained, as long as prompts or the backbone learn.

        Args:
            head: the head, which has its rows.
            config: its adapter's.
            known: how many of its classes, the first ones, were there before.
            backbone_learns: whether weights of the backbone are trained.
        """
        learning = backbone_learns or any(True for _ in self.pool.parameters())
        learns = learning and not config.prompts_frozen
        is_trained = any(name for name, _ in head.named_parameters() if not name.startswith("training_head"))
        if not head.observes or head.guides_prompts or is_trained or not learns:
            head.training_head = None
        elif head.training_head is None:
            # From a stream it sees, in the same step, what the other head observes: the CLS token stands in front.
            shared = config.stream and config.features
            width = self._geometry().hidden_size if shared else self._width_of_paper(self.pool)
            linear = LinearHead(Sizes(width, 0), head.classes, config.head_init)
            head.training_head = linear.to(self.head_device).train(head.training)
        else:
            head.training_head.grow(head.classes, keep=known)

    # ----------------------------------------------------------------------------------------------- classes

    def forget_classes(self, class_names: Sequence[str]) -> None:
        """Take classes out of the active adapter: its head then is that of a model that never saw them.

        Rows of later classes move up. Sums over pairs of features hold all classes together unless
        `head_options={"by_class": True}` keeps them apart, so only then can `lda` and `ridge` forget; nearest class
        means can in any case, and the rows of a trained head are taken out.

        Args:
            class_names: names of classes learnt.

        Raises:
            ValueError: unknown names, all classes, or sums in which the classes are not apart.

        Warns:
            UserWarning: prompts were learnt with images of these classes, and are as they were.
        """
        adapter, config = self._learning_config()
        names = [class_names] if isinstance(class_names, str) else list(class_names)
        unknown = [name for name in names if name not in config.classes]
        if unknown or not config.tasks:
            raise ValueError(
                f"{brief(unknown or names)} are no classes that this adapter has learnt. Name some of "
                f"{brief(config.classes)}."
            )
        kept = [row for row, name in enumerate(config.classes) if name not in names]
        if not kept:
            raise ValueError("All classes would be forgotten. Make a new adapter instead.")
        self.need_sums()
        head = self.head.entries[adapter]
        head.keep_rows(kept)
        if head.training_head is not None:
            head.training_head.keep_rows(kept)
        place = {row: index for index, row in enumerate(kept)}
        config.classes = [config.classes[row] for row in kept]
        config.tasks = [[place[row] for row in rows if row in place] for rows in config.tasks]
        config.forget_temperature()
        self.head.forget_rows()
        self.head.show_labels()
        if any(True for _ in self.pool.parameters()) or head.evidence is not None:
            warnings.warn(
                f"{', '.join(names)}: their rows and sums are gone, but prompts, keys and task evidence may have been "
                "learnt with their images and are as they were. Only an adapter without prompts forgets altogether.",
                stacklevel=2,
            )

    def join(self, adapter_name: str) -> None:
        """Add to the active adapter what another adapter of this model has learnt: classes, tasks and sums.

        Both must see the same features: heads on the frozen model, or on the same prompts. The result is that of one
        adapter that has learnt the tasks of both, in any order.

        Args:
            adapter_name: the other adapter, which stays as it is.

        Raises:
            ValueError: no such adapter, other prompts, or heads that cannot be joined.

        Example:
            >>> model = PeftModel.from_pretrained(base, "a", is_trainable=True)    # doctest: +SKIP
            >>> model.load_adapter("b", "b", is_trainable=True)                    # doctest: +SKIP
            >>> model.join("b")                                                    # doctest: +SKIP
        """
        adapter, config = self._learning_config()
        if adapter_name not in self.peft_config or adapter_name == adapter:
            raise ValueError(
                f"{adapter_name!r} is no other adapter of this model, which has {list(self.peft_config)}. Load it "
                "first: load_adapter(folder, adapter_name)."
            )
        other, theirs = self.peft_config[adapter_name], self.head.entries[adapter_name]
        own, others = (digest_of_weights(self.encoder.entries[name]) for name in (adapter, adapter_name))
        if own != others:
            raise ValueError(
                f"{adapter!r} and {adapter_name!r} have different prompts, so their heads see different features. "
                "Join adapters without prompts, or with the same ones."
            )
        self.need_sums()
        self.set_adapter(adapter_name)
        try:
            self.need_sums()
        finally:
            self.set_adapter(adapter)
        head, known = self.head.entries[adapter], len(config.classes)
        if not theirs.classes or not head.classes:
            raise ValueError(
                "One of the adapters has learnt no task yet, so there is nothing to join. Train it first."
            )
        classes = list(dict.fromkeys([*config.classes, *other.classes]))
        row = {name: index for index, name in enumerate(classes)}
        head.check_classes(len(classes))
        if (config.head, config.head_options, config.features) != (other.head, other.head_options, other.features):
            raise ValueError(
                f"The heads differ ({config.head!r} and {other.head!r}, or their options or features), so their sums "
                "cannot be added. Join adapters of one configuration."
            )
        head.grow(len(classes), keep=known)
        head.add(theirs, [row[name] for name in other.classes])
        head.fit()
        config.classes = classes
        config.tasks = [*config.tasks, *([row[other.classes[index]] for index in rows] for rows in other.tasks)]
        config.forget_temperature()
        self._set_training_head(head, config, known, backbone_learns=self.encoder.learns)
        self.head.forget_rows()
        self.head.show_labels()
