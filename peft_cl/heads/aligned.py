"""A trained linear head that is aligned after each task on samples of Gaussians, one for each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_choice, check_count, check_number
from .composite import CompositeHead
from .head import Sizes, register_head
from .lda import LDAHead, shrunk_covariance
from .linear import Init, LinearHead
from .sums import cholesky


#: SLCA's settings of the alignment.
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@register_head("aligned")
class AlignedHead(CompositeHead):
    """SLCA's classifier alignment (Zhang et al., ICCV 2023, arXiv 2303.05118; likewise HiDe-Prompt, arXiv 2310.07234).

    The linear head is trained on each task as published, under the mask. After the task all its rows are trained on

        (1)  f ~ N(mu_c, S_c),  as many for each class seen,
        (2)  loss = cross-entropy of z / (|z| tau),   z = W f + b,

    so that rows of different tasks are compared at last. Plain SGD with momentum 0.9 and a cosine schedule.

    Args:
        samples: for each class and epoch.
        epochs: of the alignment.
        learning_rate: of the alignment, where it begins.
        temperature: tau.
        covariance: S_c: `"shared"`, that of all classes, or `"class"`, each its own, at C times the bytes.
        shrinkage: of S_c towards a multiple of the identity, 0 to 1.
        seed: of the samples.
    """

    title = "aligned linear"
    observes = True
    part_names = ("gaussians", "linear")

    def __init__(
        self,
        sizes: Sizes,
        classes: int,
        init: Init = "default",
        *,
        samples: int = 256,
        epochs: int = 5,
        learning_rate: float = 0.01,
        temperature: float = 0.1,
        covariance: Literal["shared", "class"] = "shared",
        shrinkage: float = 0.01,
        seed: int = 0,
    ):
        super().__init__(sizes, classes)
        self.samples, self.epochs = check_count("samples", samples), check_count("epochs", epochs)
        self.learning_rate = check_number("learning_rate", learning_rate, above=0)
        self.temperature = check_number("temperature", temperature, above=0)
        self.covariance = check_choice("covariance", covariance, ("shared", "class"))
        self.shrinkage = check_number("shrinkage", shrinkage, least=0, most=1)
        self.seed = int(check_number("seed", seed, least=0))
        self.linear = LinearHead(sizes, classes, init)
        # Its sums; and it answers for a class without images, which no alignment has seen.
        self.gaussians = LDAHead(sizes, classes, shrinkage=shrinkage, by_class=covariance == "class")

    def forward(self, features, query=None):
        return self.linear(features)

    def keep_rows(self, rows: Sequence[int]) -> None:
        super().keep_rows(rows)
        self.fit()

    def unite(self, heads, rows):
        super().unite(heads, rows)
        self.fit()

    def observe(self, features, labels, query=None):
        self.gaussians.observe(features, labels)

    def fit(self):
        super().fit()
        rows = self.gaussians.seen.nonzero()[:, 0]
        if len(rows) < 2:  # nothing to compare
            return
        generator = torch.Generator().manual_seed(self.seed + int(self.gaussians.sums.images))
        means, factors = self._gaussians(rows)
        weight, bias = (parameter.detach()[rows].float().cpu() for parameter in (self.linear.weight, self.linear.bias))
        parameters = [nn.Parameter(weight), nn.Parameter(bias)]
        optimizer = torch.optim.SGD(parameters, self.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
        labels = torch.arange(len(rows)).repeat_interleave(self.samples)
        steps = self.epochs * math.ceil(len(labels) / self.samples)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(self.epochs):
                noise = torch.randn(len(rows), self.samples, means.shape[-1], generator=generator)
                drawn = (means[:, None] + noise @ factors.mT).flatten(0, 1)  # eq. 1
                for batch in torch.randperm(len(labels), generator=generator).split(self.samples):
                    logits = F.linear(drawn[batch], *parameters)
                    norm = logits.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                    loss = F.cross_entropy(logits / (norm * self.temperature), labels[batch])  # eq. 2
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        with torch.no_grad():
            self.linear.weight[rows] = parameters[0].to(self.linear.weight)
            self.linear.bias[rows] = parameters[1].to(self.linear.bias)

    def _gaussians(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means (C, F) and Cholesky factors of the covariances, (C or 1, F, F), of the classes in `rows`."""
        sums = self.gaussians.sums
        if self.covariance == "shared":
            factors = cholesky(shrunk_covariance(sums, self.shrinkage))[None]
        else:
            eye = torch.eye(sums.means.shape[-1], dtype=torch.float64, device=sums.counts.device)
            least = shrunk_covariance(sums, 1.0).diagonal().mean()  # of a class with one image nothing is known
            factors = []
            for row in rows.tolist():
                own = sums.within_class(row) / sums.counts[row]
                variance = own.diagonal().mean().clamp_min(least * 1e-3)
                factors.append(cholesky((1 - self.shrinkage) * own + self.shrinkage * variance * eye))
            factors = torch.stack(factors)
        return sums.means[rows].float().cpu(), factors.float().cpu()

    def move(self, old, new, how):
        self.gaussians.move(old, new, how)
