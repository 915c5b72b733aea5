"""What becomes of sums when training has moved the features that they are of.

Sums are exact only while features stay. Where prompts go on learning, the images of the classes before are gone, but
the new task's images can be looked at before and after its training; how they moved says how others did.
"""

from __future__ import annotations

import torch

from .sums import Sums, solve_positive


#: Of the distance weights, in units of the median distance between the new images and a class's mean.
BANDWIDTH = 0.5
#: Weight of the identity in the map, in parts of the mean eigenvalue of the features' second moment: directions into
#: which the new images hardly reach stay as they are.
IDENTITY = 1.0


@torch.no_grad()
def move_sums(sums: Sums, old: torch.Tensor, new: torch.Tensor, how: str) -> None:
    """Move the sums as the images that are there moved.

    Args:
        old, new: mapped features h of the same images before and after the training, (N, M).
        how: `"means"` or `"map"`.
    """
    old, new = (each.to(sums.counts.device, torch.float64) for each in (old, new))
    if len(old) and sums.images:
        {"means": _move_means, "map": _map_all}[how](sums, old, new)


def _move_means(sums: Sums, old: torch.Tensor, new: torch.Tensor) -> None:
    """mu_c <- mu_c + sum_i w_i (new_i - old_i) / sum_i w_i,  w_i = exp(-|old_i - mu_c|^2 / (2 sigma^2)): nearby images
    speak for a class (SDC, Yu et al., CVPR 2020, eq. 5; SSIAT, Tan et al., CVPR 2024). The scatter around means stays.
    """
    before = sums.means
    squared = torch.cdist(before, old).square()  # (C, N)
    sigma2 = BANDWIDTH**2 * squared.median(dim=1, keepdim=True).values.clamp_min(torch.finfo(old.dtype).tiny)
    weights = torch.softmax(-squared / (2 * sigma2), dim=1)
    after = before + weights @ (new - old)
    counts = sums.counts[:, None]
    if sums.gram is not None:
        sums.gram += (after * counts).T @ after - (before * counts).T @ before
    if sums.grams is not None:
        for row, count in enumerate(sums.counts):
            sums.grams[row] += count * (torch.outer(after[row], after[row]) - torch.outer(before[row], before[row]))
    sums.totals = after * counts


def _map_all(sums: Sums, old: torch.Tensor, new: torch.Tensor) -> None:
    """A = argmin |old A - new|^2 + lambda |A - I|^2, then mu <- mu A and G <- A^T G A."""
    second = old.T @ old
    eye = torch.eye(len(second), dtype=old.dtype, device=old.device)
    regular = IDENTITY * second.diagonal().mean() * eye
    change = solve_positive(second + regular, old.T @ new + regular)
    sums.totals = sums.totals @ change
    if sums.gram is not None:
        sums.gram = change.T @ sums.gram @ change
    if sums.grams is not None:
        sums.grams = change.T @ sums.grams @ change
