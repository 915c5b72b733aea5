"""Configuration of the linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft.utils.peft_types import PeftType

from ..base.config import PromptPoolConfig
from ..base.head_config import BEST


@dataclass
class LinearProbeConfig(PromptPoolConfig):
    """A linear head over the classes seen, on the frozen model's feature: the baseline without prompts.

    Example:
        >>> LinearProbeConfig(head_init="zeros").train_mask
        True
    """

    method: ClassVar[str] = "Linear probe"
    presets: ClassVar[dict] = {
        "best": {name: value for name, value in BEST.items() if name != "train_prompts"},
        "linear": {},
    }

    @property
    def has_query(self) -> bool:
        return False  # the frozen model's features are what its head sees

    @property
    def _features_title(self) -> str:
        return "Frozen features"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LINEARPROBE
        if self.query_projection is not None:
            raise ValueError(
                f"query_projection is {self.query_projection!r}, but a linear probe has no query. Leave it at None."
            )
