"""Sums over features, from which class means, discriminants and ridge regressions are computed exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch


class Sums:
    """What is kept of the features of all images seen; h in R^M is a feature after the head's map, C classes:

        n_c = number of images of class c,   Q_c = sum of their h,   G = sum h h^T over all classes.

    They are sums, so they do not depend on the order of the data, the number of tasks or of processes, and those of
    two adapters add up. They are float64: in float32 the sums of millions of images, and the difference between G and
    the class means' part of it, would lose the digits that matter. They are no buffers of a module: casting a model to
    16 bits must not touch them.

    Args:
        classes: C.
        width: M.
        gram: keep G, (M, M).
        by_class: keep the part G_c of each class in its place, (C, M, M): it makes classes forgettable, at C times the
            bytes.
    """

    def __init__(self, classes: int, width: int, gram: bool = True, by_class: bool = False):
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.totals = torch.zeros(classes, width, dtype=torch.float64)
        self.gram = torch.zeros(width, width, dtype=torch.float64) if gram and not by_class else None
        self.grams = torch.zeros(classes, width, width, dtype=torch.float64) if by_class else None

    @property
    def classes(self) -> int:
        return len(self.counts)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are kept, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def images(self) -> float:
        """N, the number of images seen."""
        return self.counts.sum().item()

    @property
    def means(self) -> torch.Tensor:
        """mu_c = Q_c / n_c, (C, M); 0 for a class without images."""
        return self.totals / self.counts.clamp_min(1)[:, None]

    @property
    def mean(self) -> torch.Tensor:
        """The mean of all images, (M,)."""
        return self.totals.sum(0) / self.counts.sum().clamp_min(1)

    @property
    def moment(self) -> torch.Tensor:
        """G, (M, M)."""
        return self.gram if self.grams is None else self.grams.sum(0)

    def within(self) -> torch.Tensor:
        """The scatter of images around their classes' means, G - sum_c n_c mu_c mu_c^T, (M, M)."""
        return self.moment - self.totals.T @ self.means

    def within_class(self, row: int) -> torch.Tensor:
        """The scatter of the images of one class around their mean, (M, M)."""
        return self.grams[row] - torch.outer(self.totals[row], self.means[row])

    # ----------------------------------------------------------------------------------------------- adding

    def observe(self, mapped: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images: h (B, M) and rows of their classes (B,)."""
        device = "cpu" if mapped.device.type == "mps" else mapped.device  # which has no float64
        self.to(device)
        mapped, labels = mapped.detach().to(device, torch.float64), labels.to(device)
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self.totals.index_add_(0, labels, mapped)
        if self.gram is not None:
            self.gram.addmm_(mapped.T, mapped)
        if self.grams is not None:
            for row in labels.unique().tolist():
                own = mapped[labels == row]
                self.grams[row].addmm_(own.T, own)

    def add(self, other: Sums, rows: Sequence[int] | None = None) -> None:
        """Add other sums, whose class i is this one's class `rows[i]` (None: the same)."""
        device = self.counts.device
        place = torch.arange(other.classes) if rows is None else torch.as_tensor(rows)
        for name, value in self.tensors.items():
            more = other.tensors[name].to(device)
            if name == "gram":
                value += more
            else:
                value.index_add_(0, place.to(device), more)

    def merge(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take the sum over all processes; `total` sums a tensor over them."""
        for name, value in self.tensors.items():
            setattr(self, name, total(value))

    def grow(self, classes: int) -> None:
        """Make room for new classes."""
        for name, value in self.tensors.items():
            if name != "gram":
                room = value.new_zeros(classes - len(value), *value.shape[1:])
                setattr(self, name, torch.cat([value, room]))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these classes, in this order, and take the others' part out.

        Raises:
            ValueError: G was kept, but not by class, so that no class's part of it is known.
        """
        if self.gram is not None:
            raise ValueError(
                "Sums were not kept class by class, so no class can be taken out of them. Set "
                'head_options={"by_class": True} before the first task (it takes C times the bytes), or learn the '
                "other classes anew."
            )
        for name, value in self.tensors.items():
            setattr(self, name, value[list(rows)].clone())

    def to(self, device: torch.device | str) -> None:
        for name, value in self.tensors.items():
            setattr(self, name, value.to(device))

    def clone(self) -> Sums:
        return Sums.of({name: value.clone() for name, value in self.tensors.items()})

    # ----------------------------------------------------------------------------------------------- on disk

    def packed(self) -> dict[str, torch.Tensor]:
        """The tensors as they are kept in files, on the CPU; of a symmetric matrix, its upper triangle."""
        return {
            name: (_upper(value) if name in ("gram", "grams") else value).cpu() for name, value in self.tensors.items()
        }

    @classmethod
    def unpacked(cls, packed: Mapping[str, torch.Tensor]) -> Sums:
        """The sums that `packed` gave."""
        width = packed["totals"].shape[-1]
        symmetric = ("gram", "grams")
        return cls.of({name: _whole(value, width) if name in symmetric else value for name, value in packed.items()})

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Sums:
        """Sums of these tensors."""
        sums = cls(0, 0, gram=False)
        for name, value in tensors.items():
            setattr(sums, name, value)
        return sums


def _upper(matrix: torch.Tensor) -> torch.Tensor:
    """(..., M, M) -> (..., M (M + 1) / 2)."""
    rows, columns = torch.triu_indices(*matrix.shape[-2:], device=matrix.device)
    return matrix[..., rows, columns].contiguous()


def _whole(upper: torch.Tensor, width: int) -> torch.Tensor:
    """(..., M (M + 1) / 2) -> the symmetric matrix (..., M, M)."""
    rows, columns = torch.triu_indices(width, width)
    matrix = upper.new_zeros(*upper.shape[:-1], width, width)
    matrix[..., rows, columns] = upper
    matrix[..., columns, rows] = upper
    return matrix


# ------------------------------------------------------------------------------------------------------- solving


def solve_positive(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """X with `matrix` X = `right`, for a symmetric positive semi-definite matrix (M, M) in float64.

    By Cholesky; where rounding has left the matrix without one, the diagonal gets jitter that grows until it has.
    """
    return torch.cholesky_solve(right, cholesky(matrix))


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor of a symmetric positive semi-definite matrix, with as much jitter as it takes."""
    scale = matrix.diagonal().abs().mean().clamp_min(torch.finfo(matrix.dtype).tiny ** 0.5)
    jitter = 0.0
    while True:
        jittered = matrix + jitter * scale * torch.eye(len(matrix)).to(matrix) if jitter else matrix
        factor, failed = torch.linalg.cholesky_ex(jittered)
        if not failed.item() and factor.diagonal().gt(0).all():
            return factor
        jitter = max(1e-12, jitter * 10)
        if jitter > 1e6:
            raise ValueError("The sums of a head hold numbers that are not finite. Observe the images anew.")
