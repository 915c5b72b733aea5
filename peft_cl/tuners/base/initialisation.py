"""How rows of a pool begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from .saved import file_beside, part_of_pool, read_header


#: The official JAX code draws prompts and keys from U[0, 0.01), its PyTorch ports from U(-1, 1), CODA's from U[0, 1).
UNIFORM_RANGES = {"uniform": (0.0, 0.01), "wide_uniform": (-1.0, 1.0), "unit_uniform": (0.0, 1.0)}
#: Standard deviations.
NORMAL = {"normal": 0.02, "near_zero": 1e-4}
#: The last two come from elsewhere: from images of a task, or another adapter. Until then rows are normal.
ORTHOGONAL, PATCHES, FROM_ADAPTER = "orthogonal", "patches", "adapter"


def draw_rows(kind: str, *shape: int) -> torch.Tensor:
    """Random float32 rows: a uniform range of `UNIFORM_RANGES`, or normal with a deviation of `NORMAL`."""
    if kind in UNIFORM_RANGES:
        return torch.empty(*shape).uniform_(*UNIFORM_RANGES[kind])
    return torch.randn(*shape) * NORMAL.get(kind, NORMAL["normal"])


def layer_by_layer(first: torch.Tensor, layers: int, noise: float) -> torch.Tensor:
    """Rows (layers, ...) of which each layer's are those of the layer before plus noise (section 7's hierarchical
    initialisation).

    Args:
        first: (...), the first layer's.
        noise: standard deviation.
    """
    steps = torch.randn(layers - 1, *first.shape) * noise
    return torch.cat([first[None], first + steps.cumsum(0)])


def some_of(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of `rows` (N, ...) by chance, each as often as another: none twice before all were taken."""
    order = [torch.randperm(len(rows)) for _ in range(-(-count // len(rows)))]
    return rows[torch.cat(order)[:count].to(rows.device)]


def check_source(place: str) -> None:
    """Refuse a place without the prompts of an adapter.

    Raises:
        ValueError: it names the place.
    """
    path = file_beside((place, {}), SAFETENSORS_WEIGHTS_NAME)
    if path is None or not any(part_of_pool(key) == "prompts" for key in read_header(path)):
        raise ValueError(
            f"init_from is {place!r}, but no prompt adapter is there ({SAFETENSORS_WEIGHTS_NAME} with the prompts of "
            "a pool). Give the folder that save_pretrained wrote, or its Hub name."
        )


def rows_of_adapter(place: str, axes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The rows of a saved adapter, float32, those of its past tasks first.

    Args:
        place: its folder or Hub name.
        axes: name of a parameter -> the axis of its rows.
    """
    tensors = load_file(file_beside((place, {}), SAFETENSORS_WEIGHTS_NAME))
    found = {}
    for name, axis in axes.items():
        wanted = (f"past_{name}", name)
        parts = [value for each in wanted for key, value in tensors.items() if part_of_pool(key) == each]
        if parts:
            found[name] = torch.cat(parts, dim=axis).float()
    return found


class RowSpan:
    """The span of the rows so far, which new rows are to avoid (CODA-Prompt, section 4.2).

    Gram-Schmidt by QR, a task's rows at a time: an orthonormal basis is kept and extended, so the start of a task
    costs a product with the basis, not a factorisation of all rows. The basis is on the CPU, in float32, and as large
    as the rows. It depends on the rows alone, not on when it was made.

    There are at most D orthogonal rows of D numbers. Where there is no room for more, the basis begins anew with the
    latest D / 2 rows, so new rows avoid these and those after them.

    Args:
        size: D.
        count: number of rows that a task brings.

    Raises:
        ValueError: count > D.

    Example:
        >>> span = RowSpan(size=768, count=10)
        >>> rows = torch.eye(768)[:20]
        >>> span.follow(20, lambda first, last: rows[first:last])
        >>> span.new_rows().shape
        torch.Size([10, 768])
    """

    def __init__(self, size: int, count: int):
        if count > size:
            raise ValueError(
                f"{count} new rows of {size} numbers cannot be orthogonal: at most {size} can. Begin with fewer rows "
                "(pool_size, growth_size or components_per_task), or otherwise (init)."
            )
        self.size = size
        self.count = count
        self.rows_seen = 0
        self.basis = torch.zeros(0, size)

    def follow(self, total: int, rows: Callable[[int, int], torch.Tensor]) -> None:
        """Take in what there is beyond the rows seen.

        Args:
            total: rows there are.
            rows: gives those from a first to before a last one, (rows, D); they may be neither unit nor orthogonal.
        """
        while self.rows_seen < total:
            end = min(self.rows_seen + self.count, total)
            if len(self.basis) + self.count > self.size - self.count:
                latest = max(0, min(self.size // 2, self.size - 2 * self.count))
                self.basis = self.basis[:0]
                self._add(rows(max(0, self.rows_seen - latest), self.rows_seen))
            self._add(rows(self.rows_seen, end))
            self.rows_seen = end

    def new_rows(self) -> torch.Tensor:
        """Random unit rows, (count, D), orthogonal to each other and to the span."""
        room = self.size - self.count
        drawn = self._outside(
            torch.randn(self.count, self.size, dtype=torch.float64), self.basis[-room:] if room else None
        )
        rows, upper = torch.linalg.qr(drawn.double().T)
        # QR fixes rows up to sign; Gram-Schmidt's sign makes the diagonal positive.
        return (rows * torch.sign(torch.diagonal(upper))).T.float()

    def _add(self, rows: torch.Tensor) -> None:
        rows = rows.detach().float().cpu()
        directions, upper = torch.linalg.qr(self._outside(rows, self.basis).double().T)
        # Rows within the span add no direction, and QR's column for such a row is anything: it may hold part of the
        # rows after it, which are then looked at once more.
        is_new = torch.diagonal(upper).abs() > 1e-5 * rows.double().norm(dim=1)
        self.basis = torch.cat([self.basis, directions.T[is_new].float()])
        if not is_new.all():
            missed = self._outside(rows, self.basis).norm(dim=1) > 1e-5 * rows.norm(dim=1)
            if missed.any():
                self._add(rows[missed])

    @staticmethod
    def _outside(rows: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
        """The part of `rows` that is orthogonal to `basis`."""
        if basis is None or not len(basis):
            return rows
        rows = rows.to(basis)
        for _ in range(2):  # twice is enough (Kahan): the second pass removes what rounding left
            before = rows.norm(dim=1)
            rows = rows - (rows @ basis.T) @ basis
            if (rows.norm(dim=1) > 0.5 * before).all():
                break  # little was cancelled, so little was left
        return rows
