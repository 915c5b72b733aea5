"""Maps that a head may put features through: drawn once from a seed, the same for all data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class RandomProjection(nn.Module):
    """h = relu(f W_r), W_r ~ N(0, 1)^(F x M), divided by sqrt(F): (B, F) -> (B, M) (RanPAC, arXiv 2307.02251, eq. 2).

    Args:
        size: F.
        width: M.
        normalize: standardise each feature vector first (layer norm without weights), so that the relu cuts where it
            matters whatever the backbone's scale. RanPAC does not.
        seed: of W_r.
    """

    def __init__(self, size: int, width: int, normalize: bool = False, seed: int = 0):
        super().__init__()
        self.width, self.normalize = width, normalize
        # Drawn again when an adapter is loaded, not saved: it may be larger than the rest of the adapter.
        self.register_buffer("projection", _normal(_stream(seed), size, width), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = F.layer_norm(features, features.shape[-1:]) if self.normalize else features
        return torch.relu(features @ self.projection.to(features.dtype))


class FourierFeatures(nn.Module):
    """h = [z, sqrt(2) cos(gamma z W + b)]: the standardised feature and a random basis of a Gaussian kernel on it,
    (B, F) -> (B, F + M) (Rahimi and Recht, NeurIPS 2007; for class-incremental LDA: KLDA, arXiv 2412.15571).

    The kernel is exp(-gamma^2 |z - z'|^2 / (2 F)). Its bandwidth decides, and usually comes from the data; but a
    standardised z has |z|^2 = F whatever the backbone, so that one gamma serves all, and the map needs no data.

    Args:
        size: F.
        width: M, the number of cosines.
        gamma: the inverse bandwidth, for distances in units of sqrt(F).
        seed: of W ~ N(0, 1)^(F x M) / sqrt(F) and b ~ U(0, 2 pi)^M.
    """

    def __init__(self, size: int, width: int, gamma: float = 0.75, seed: int = 0):
        super().__init__()
        self.width, self.gamma = size + width, gamma
        stream = _stream(seed)
        self.register_buffer("projection", _normal(stream, size, width), persistent=False)
        phases = _drawn(lambda: stream.uniform(0, 2 * np.pi, width), width)
        self.register_buffer("phases", phases, persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        standard = F.layer_norm(features, features.shape[-1:])
        angles = self.gamma * (standard @ self.projection.to(features.dtype)) + self.phases.to(features.dtype)
        return torch.cat([standard, math.sqrt(2) * angles.cos()], dim=-1)


def _stream(seed: int) -> np.random.RandomState:
    """The one stream of numbers that numpy promises never to change (NEP 19): an adapter, which holds the seed alone,
    must read the same in ten years."""
    return np.random.RandomState(seed)


def _normal(stream: np.random.RandomState, size: int, width: int) -> torch.Tensor:
    """N(0, 1) / sqrt(F), (F, M): the division takes back what sums of F numbers gain."""
    return _drawn(lambda: stream.standard_normal((size, width)) / math.sqrt(size), size, width)


def _drawn(draw: Callable[[], np.ndarray], *shape: int) -> torch.Tensor:
    """What numpy draws, as float32; on the device "meta", where sizes alone are asked for, nothing is drawn."""
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    return torch.from_numpy(draw().astype(np.float32))
