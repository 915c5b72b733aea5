"""LDA where some classes have far fewer images than others (`few_images`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_cl.heads import LDAHead, Sizes
from peft_cl.heads.lda import trust_in_means


def test_a_class_of_few_images_beside_classes_of_many():
    """Noise in 300 directions takes the mean of 4 images far from all images, its own class's included."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 0.25, (6, 300))

    def drawn(row: int, count: int) -> torch.Tensor:
        return torch.from_numpy(centres[row] + rng.normal(0, 1, (count, 300))).float()

    accuracies = {}
    train = [drawn(row, 200 if row < 5 else 4) for row in range(6)]
    test = [drawn(row, 200) for row in range(6)]
    for few in (False, True):
        head = LDAHead(Sizes(300, 0), 6, few_images=few)
        for row, own in enumerate(train):
            head.observe(own, torch.full((len(own),), row))
        head.fit()
        accuracies[few] = [(head(own).argmax(-1) == row).float().mean().item() for row, own in enumerate(test)]
    assert accuracies[False][5] < 0.1 and accuracies[True][5] > 0.8
    assert np.mean(accuracies[True][:5]) > np.mean(accuracies[False][:5]) - 0.1


def test_equal_counts_change_nothing():
    features, labels = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    weights = []
    for few in (False, True):
        head = LDAHead(Sizes(12, 0), 4, few_images=few)
        head.observe(features, labels)
        head.fit()
        weights.append(head.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_how_far_a_mean_is_trusted(shrinkage):
    """Equation 4 with the exact trace in the place of the estimate."""
    spread = torch.randn(90, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigma = spread.T @ spread / 90
    covariance = (1 - shrinkage) * sigma + shrinkage * sigma.diagonal().mean() * torch.eye(60, dtype=torch.float64)
    trace = torch.linalg.solve(covariance, sigma).trace()
    counts = torch.tensor([50.0, 50.0, 80.0, 5.0, 0.0], dtype=torch.float64)
    lengths = torch.tensor([3.0, 4.0, 5.0, 20.0, 0.0], dtype=torch.float64)
    found = trust_in_means(counts, lengths, torch.linalg.cholesky(covariance), shrinkage)
    expected = 4 / (4 + trace * (1 / 5 - 1 / 50))
    assert found[:3].tolist() == [1, 1, 1] and found[3].item() == pytest.approx(expected.item(), rel=0.1)
    assert found.isfinite().all()
