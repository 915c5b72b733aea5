"""Facts of a backbone that configurations, pools and heads need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Sizes of a backbone, and what can be read and prompted in it.

    Attributes:
        hidden_size: D, the width of the features by which prompts are chosen.
        num_layers: layers that can be prompted.
        own_width: numbers that the model's own classifier reads. None: `hidden_size`.
        layer_sizes: the width of each layer. None: `hidden_size` of all.
        has_cls: whether there is a CLS token, or what the family pools in its place.
        has_cls_token: whether it is a token.
        special_tokens: tokens in front of the patches.
        reads_cls: whether the model's own classifier reads that alone.
        why_no_tokens: why prompts cannot enter as tokens; None: they can.
    """

    hidden_size: int
    num_layers: int
    own_width: int | None = None
    layer_sizes: tuple[int, ...] | None = None
    has_cls: bool = True
    has_cls_token: bool = True
    special_tokens: int = 1
    reads_cls: bool = True
    why_no_tokens: str | None = None

    @property
    def reads(self) -> int:
        """Numbers that the model's own classifier reads."""
        return self.hidden_size if self.own_width is None else self.own_width

    def size_at(self, layers: tuple[int, ...] | list[int]) -> int:
        """The width of prompts at these layers: that of the widest. A narrower layer reads their first numbers."""
        if self.layer_sizes is None or not layers:
            return self.hidden_size
        return max(self.layer_sizes[layer] for layer in layers)

    @property
    def alike_at_the_end(self) -> int:
        """How many of the last layers have the width of the features."""
        if self.layer_sizes is None:
            return self.num_layers
        different = [size != self.hidden_size for size in reversed(self.layer_sizes)]
        return different.index(True) if True in different else self.num_layers
