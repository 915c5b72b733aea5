"""Configuration of the linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft.utils.peft_types import PeftType

from ..base.config import PromptPoolConfig
from ..base.head_config import BEST_FROZEN


@dataclass
class LinearProbeConfig(PromptPoolConfig):
    """A head over the classes seen on the frozen model's features: the baseline without prompts, a linear one unless
    `head` says otherwise.

    Presets: `best` (ours: the head that the other methods' `best` has), `linear`.

    Example:
        >>> LinearProbeConfig(head_init="zeros").train_mask
        True
    """

    method: ClassVar[str] = "Linear probe"
    presets: ClassVar[dict] = {
        "best": BEST_FROZEN,
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
