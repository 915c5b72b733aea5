"""What a head sees of an image."""

from __future__ import annotations

from dataclasses import dataclass


#: Parts of a layer's output: the CLS token, and the mean of the patches. Where there is no CLS token, what the family
#: pools in its place, or the mean.
PARTS = ("cls", "mean")
#: What the base model's own classifier reads, of the last layer.
OWN_PART = "own"
#: In `head_features`, for the frozen model's features of the same parts beside those of the prompted one.
QUERY = "query"


@dataclass(frozen=True)
class Features:
    """Parts of the last layers' outputs, each after the final norm, one behind the other: the last layer comes first.

    Attributes:
        parts: of `PARTS`, in that order.
        layers: how many of the last layers.
        query: whether the frozen model's features stand behind the prompted model's.
        has_cls: whether the backbone has a CLS token or something in its place; otherwise `"cls"` is the mean too.
    """

    parts: tuple[str, ...] = ("cls",)
    layers: int = 1
    query: bool = False
    has_cls: bool = True

    @classmethod
    def parse(cls, text: str, layers: int, has_cls: bool = True) -> Features:
        """From `head_features`, such as `"cls+mean"` or `"cls+mean+query"`, and `head_layers`.

        Raises:
            ValueError: other parts, parts named twice, or none.
        """
        names = text.split("+") if isinstance(text, str) else []
        own = tuple(part for part in PARTS if part in names)
        if not own or len(set(names)) < len(names) or set(names) - {*PARTS, QUERY}:
            raise ValueError(
                f"head_features is {text!r}, but must name parts joined by '+': 'cls' (the CLS token), 'mean' (the "
                f"mean of the patches), and with one of them {QUERY!r} (the frozen model's features too); for "
                "instance 'cls+mean'."
            )
        return cls(own if has_cls else ("mean",), layers, QUERY in names, has_cls)

    @property
    def of_query(self) -> Features:
        """The features of the frozen model: the CLS token of the last layer is the first of them, as prompts are
        chosen by it."""
        parts = tuple(part for part in PARTS if (part == "cls" and self.has_cls) or part in self.parts)
        return Features(parts, self.layers, has_cls=self.has_cls)

    @property
    def reads_all(self) -> bool:
        """Whether all tokens of the last layer are needed."""
        return "mean" in self.parts

    def width(self, hidden_size: int, own_width: int | None = None) -> int:
        """F, for a model of this width, whose own classifier reads `own_width` numbers (None: as many)."""
        own = len(self.parts) * self.layers * hidden_size
        if self.parts == (OWN_PART,):
            own = hidden_size if own_width is None else own_width
        return own + (self.of_query.width(hidden_size) if self.query else 0)


#: What L2P, DualPrompt and CODA-Prompt call the query, and what their heads read unless they are told otherwise.
CLS = Features()
#: What a head without prompts reads unless it is told otherwise.
OWN = Features((OWN_PART,))
