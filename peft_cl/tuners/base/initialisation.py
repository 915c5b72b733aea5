"""How rows of a pool begin."""

from __future__ import annotations

import torch


#: The official JAX code draws prompts and keys from U[0, 0.01), its PyTorch ports from U(-1, 1), CODA's from U[0, 1).
UNIFORM_RANGES = {"uniform": (0.0, 0.01), "wide_uniform": (-1.0, 1.0), "unit_uniform": (0.0, 1.0)}


def draw_rows(kind: str, *shape: int) -> torch.Tensor:
    """Random float32 rows: a uniform range of `UNIFORM_RANGES`, or `"normal"` with standard deviation 0.02."""
    if kind == "normal":
        return torch.randn(*shape) * 0.02
    return torch.empty(*shape).uniform_(*UNIFORM_RANGES[kind])


def orthonormal_rows(count: int, past: torch.Tensor) -> torch.Tensor:
    """New unit rows, orthogonal to each other and to all earlier rows (CODA-Prompt, section 4.2).

    Args:
        count: number of new rows.
        past: (rows, D) earlier rows; they may be trained, that is, neither unit nor orthogonal.

    Returns:
        (count, D). Gram-Schmidt on random rows, done by QR: same result, and steady for thousands of rows. There are
        at most D orthogonal rows of D numbers; beyond that the new rows avoid the latest rows for which there is room.

    Raises:
        ValueError: count > D.
    """
    size = past.shape[-1]
    if count > size:
        raise ValueError(
            f"{count} new rows of {size} numbers cannot be orthogonal: at most {size} can. Lower components_per_task."
        )
    recent = past[max(0, len(past) - (size - count)) :].double()
    drawn = torch.randn(count, size, dtype=torch.float64)
    if len(recent):
        basis, _ = torch.linalg.qr(recent.T)
        for _ in range(2):  # twice is enough (Kahan): the second pass removes what rounding left
            drawn = drawn - (drawn @ basis) @ basis.T
    rows, upper = torch.linalg.qr(drawn.T)
    # QR fixes rows up to sign; Gram-Schmidt's sign makes the diagonal positive.
    return (rows * torch.sign(torch.diagonal(upper))).T.float()
