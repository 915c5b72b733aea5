"""A saved adapter and what belongs to it: its base model, its image processor, and the record of its run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..disk import local_path
from ..hub.shared_files import fits_adapter
from ..hub.sources import find_source
from ..metrics import RunResults
from ..strategies.fine_tuning import BACKBONE_FOLDER
from ..text import brief
from ..tuners.base.config import PromptPoolConfig
from .errors import CommandError
from .sources import (
    PROCESSOR_FILES,
    RESULTS_FILE,
    adapter_folder,
    backbone_path,
    load_backbone,
    load_config,
    load_results,
)


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk.

    Attributes:
        name: What the user calls it.
        folder: Where its files lie.
        config: Its configuration.
        results: The record of the run that wrote it, `None` if there is none beside it.
    """

    name: str
    folder: Path
    config: PromptPoolConfig
    results: RunResults | None

    @classmethod
    def read(cls, name: str) -> SavedAdapter:
        """Read an adapter by its folder or its name on the Hub, without its weights.

        Raises:
            CommandError: There is no such adapter, it is of another library, or a file is damaged.
        """
        folder = adapter_folder(name)
        config, results = load_config(folder), load_results(folder)
        if results is not None and not fits_adapter(config, results):
            warnings.warn(
                f"The {RESULTS_FILE} beside {name!r} tells of other tasks than the adapter has learnt, and is left "
                "out. Put the record of its own run there.",
                stacklevel=2,
            )
            results = None
        return cls(name, folder, config, results)

    @property
    def names_of_tasks(self) -> tuple[str, ...]:
        """A name for each of its tasks: those on record, or `task_0`, `task_1`, ..."""
        return self.task_names or tuple(f"task_{number}" for number in range(self.config.num_tasks))

    @property
    def base_model(self) -> str | None:
        """The base model beside it, as fine-tuning saves one, or else the one that it names."""
        beside = self.folder / BACKBONE_FOLDER
        return str(beside) if beside.is_dir() else self.config.base_model_name_or_path

    @property
    def processor(self) -> str | None:
        """The folder of the image processor that it was learnt with; `None`: that of its base model."""
        return str(self.folder) if any((self.folder / file).is_file() for file in PROCESSOR_FILES) else None

    @property
    def dtype(self) -> str:
        """The number format of the backbone in training; float32 where it is not on record."""
        found = self.results.hyperparameters.get("backbone_dtype", "float32") if self.results else "float32"
        if found not in DTYPES:
            raise CommandError(
                f"The record beside {self.name!r} says that the backbone was {brief(found)}, but it is one of "
                f"{', '.join(DTYPES)}. Give --dtype, or restore {RESULTS_FILE}."
            )
        return found

    @property
    def scenario(self) -> str | None:
        """The kind of scenario that it was learnt from; `None` where it is not on record."""
        return self.results.scenario.get("name") if self.results else None

    @property
    def task_names(self) -> tuple[str, ...] | None:
        """The names of its tasks; `None` where not all of them, and no others, are on record."""
        names = tuple(self.results.task_names) if self.results else ()
        # A run that was interrupted has names of tasks to come; one that taught an adapter more, only its own.
        is_whole = self.results is not None and self.results.finished_tasks == len(names) == self.config.num_tasks
        return names if is_whole else None

    def complete(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return a section `model` in which the adapter says what the user leaves out.

        Raises:
            CommandError: The user's model is another than the adapter's.
        """
        given = {name: value for name, value in model.items() if value is not None}
        if isinstance(given.get("name"), str):
            self._refuse_another_base(given["name"])
        own = {"name": self.base_model, "dtype": self.dtype} if self.base_model else {"dtype": self.dtype}
        return {**own, **given}

    def _refuse_another_base(self, name: str) -> None:
        own = self.base_model
        if not own or _place(name) == _place(own):
            return
        if find_source(own).is_local and not _place(own).exists():
            return  # the folder was moved, and nobody else can say where to
        raise CommandError(
            f"model.name is {name!r}, but the adapter {self.name!r} was learnt on {own!r}, and fits no other. Leave "
            "model.name out."
        )

    def load_base(
        self, name: str, dtype: str, attn_implementation: str | None = None, trust_remote_code: bool = False
    ) -> PreTrainedModel:
        """Load its base model, `base_model` or what the user gave in its place."""
        try:
            return load_backbone(name, dtype, attn_implementation, trust_remote_code)
        except CommandError as error:
            if name != self.base_model:
                raise
            raise CommandError(f"{error} Or give the adapter's base model by --model.") from error


def _place(name: str) -> Path:
    """Where a model lies, if its name is that of a folder; a name on the Hub stays different from all others."""
    return local_path(backbone_path(name)).resolve()
