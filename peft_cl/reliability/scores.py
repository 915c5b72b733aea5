"""Scores of images: how much an image is like what an adapter has learnt. They tell images of other classes apart.

All scores are higher for images that are more like what was learnt, so that one threshold reads the same for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from peft import PeftModel
from scipy.stats import rankdata
from torch import nn

from ..backbones.modes import evaluation_mode
from ..tuners.base.pool import PromptPool
from ..tuners.base.similarity import cosine
from .gaussians import GaussianPart, gaussians_of


#: Names of the scores.
SCORES = ("max_probability", "energy", "key_similarity", "mahalanobis")


# ------------------------------------------------------------------------------------------------------- scores


def max_probability(logits: torch.Tensor) -> torch.Tensor:
    """The greatest softmax probability (Hendrycks and Gimpel 2017, arXiv 1610.02136): (B, C) -> (B,) float64, from 1/C
    to 1.

    Logits of -inf, of classes that are out of the question, have probability 0. Very peaked logits, such as the
    log-likelihoods of "lda" with few images, give 1 for all images, which then cannot be told apart by it.

    Example:
        >>> max_probability(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        tensor([0.5000, 0.9999], dtype=torch.float64)
    """
    return logits.double().softmax(-1).amax(-1)  # float32 would be 1 from a difference of 17 on, float64 from 37 on


def energy(logits: torch.Tensor) -> torch.Tensor:
    """Minus the free energy, log sum_c exp(logit_c) (Liu et al. 2020, arXiv 2010.03759, eq. 4 with T = 1): (B, C) ->
    (B,) float64, any number.

    It has the scale of the logits. Logits that are log-likelihoods up to what all classes share, as those of "lda",
    lack that part, so their energy says less than `mahalanobis`.

    Example:
        >>> energy(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        tensor([0.6931, 9.0001], dtype=torch.float64)
    """
    return logits.double().logsumexp(-1)


def key_similarity(query: torch.Tensor, keys: torch.Tensor, attention: torch.Tensor | None = None) -> torch.Tensor:
    """The greatest cosine of a query with the keys of a pool, averaged over key sets: from -1 to 1.

    Args:
        query: (B, D).
        keys: (sets, M, D).
        attention: CODA-Prompt's attention vectors A, (sets, M, D): the cosines are those of q * A and K then (its
            eq. 5 and 6).

    Returns:
        (B,)

    Example:
        >>> key_similarity(torch.tensor([[3.0, 4.0]]), torch.eye(2)[None])
        tensor([0.8000])
    """
    query, keys = query.float(), keys.float()
    if attention is None:
        found = cosine(query, keys)  # (sets, B, M)
    else:
        # A set at a time: the products q * A, (B, M, D), are large.
        found = torch.stack(
            [
                torch.cosine_similarity(query[:, None] * weights.float(), rows, dim=-1)
                for rows, weights in zip(keys, attention, strict=True)
            ]
        )
    return found.amax(-1).mean(0)


def mahalanobis(
    features: torch.Tensor, parts: Sequence[GaussianPart], query: torch.Tensor | None = None
) -> torch.Tensor:
    """Minus the smallest squared Mahalanobis distance to a class mean under the shared covariance (Lee et al. 2018,
    arXiv 1807.03888, eq. 2): (B,) float64, at most 0.

    Args:
        features: (B, F), what the head reads.
        parts: `gaussians_of(head)`. Of several parts (a fusion) the distances to the same class add up.
        query: (B, Q), the frozen model's features, for parts that read them.
    """
    return -sum(part.distances(features, query) for part in parts).amin(-1)


# ------------------------------------------------------------------------------------------------------- a model's


class ImageScorer:
    """Scores of batches of images by a model: one call of it gives all of them.

    Args:
        model: A `PeftModel` with an adapter of this library that has learnt classes. Of another model that returns
            `logits` (an `AdapterEnsemble`, whose logits are log-probabilities) there is `max_probability` alone.
        scores: Names of scores. `None`: all that there are.

    Attributes:
        missing: Name -> why there is no such score. Key similarity needs keys and a query, Mahalanobis distances a
            head that keeps sums over features.

    Raises:
        ValueError: No classes are learnt, or a score in `scores` is unknown or missing.

    Example:
        >>> scorer = ImageScorer(model)                  # doctest: +SKIP
        >>> sorted(scorer(pixel_values))                 # doctest: +SKIP
        ['energy', 'key_similarity', 'mahalanobis', 'max_probability']
    """

    def __init__(self, model: nn.Module, scores: Sequence[str] | None = None):
        wanted = SCORES if scores is None else tuple(scores)
        if unknown := [name for name in wanted if name not in SCORES]:
            raise ValueError(f"scores has {unknown[0]!r}, but must be of {', '.join(SCORES)}. Correct the name.")
        self.model, self.missing = model, {}
        self.tuner = model.base_model if isinstance(model, PeftModel) else None
        self.parts: list[GaussianPart] = []
        if self.tuner is None:
            self.missing = dict.fromkeys(SCORES[1:], "a single adapter has it, and this is an ensemble of several")
        else:
            self._look(wanted)
        if scores is not None and (missing := [name for name in wanted if name in self.missing]):
            raise ValueError(f"The score {missing[0]!r} is missing: {self.missing[missing[0]]}. Leave it out.")
        self.scores = tuple(name for name in wanted if name not in self.missing)

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, query: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Scores of a batch by name, (B,) each.

        Args:
            pixel_values: (B, channels, height, width), on the model's device.
            query: (B, Q), the frozen model's features, where they are known.
        """
        inputs = {} if query is None else {"query": query}
        capturing = nullcontext([None, None]) if self.tuner is None else self.tuner.head.capturing()
        with evaluation_mode(self.model), capturing as captured:
            logits = self.model(pixel_values=pixel_values, **inputs).logits
            features, query = captured
        scored = {
            "max_probability": lambda: max_probability(logits),
            "energy": lambda: energy(logits),
            "key_similarity": lambda: self._key_similarity(query),
            "mahalanobis": lambda: mahalanobis(features, self.parts, query),
        }
        return {name: scored[name]() for name in self.scores}

    def _look(self, wanted: Sequence[str]) -> None:
        """Find out which scores the adapter has; the sums of its head are large, and read only if they are wanted."""
        config, pool = self.tuner.peft_config[self.tuner.active_adapters[0]], self.tuner.pool
        if not config.tasks:
            raise ValueError("The adapter has learnt no classes yet, so no image is like them. Train it first.")
        if not pool.needs_query or _rows(pool, "keys") is None:
            self.missing["key_similarity"] = "the adapter has no keys that are compared with a query of the image"
        if "mahalanobis" in wanted and (reason := self._without_sums()):
            self.missing["mahalanobis"] = reason

    def _without_sums(self) -> str | None:
        """Why there are no Gaussians; `None`: there are, in `parts`."""
        head = self.tuner.head.active
        try:
            self.tuner.need_sums()
        except ValueError as error:  # they are not beside the adapter, or damaged
            return f"the sums of its head cannot be read ({str(error).rstrip('.')})"
        self.parts = gaussians_of(head)
        if self.parts:
            return None
        return (
            f"its head ({head.title}) keeps no sums over pairs of features, so no covariance is known; 'lda', 'ridge' "
            "and the heads of the preset 'best' keep them"
        )

    def _key_similarity(self, query: torch.Tensor) -> torch.Tensor:
        pool = self.tuner.pool
        own = pool.mapped(query[:, : pool.geometry.hidden_size])
        return key_similarity(own, _rows(pool, "keys"), _rows(pool, "attention"))


def _rows(pool: PromptPool, name: str) -> torch.Tensor | None:
    """The rows of keys or attention vectors (sets, M, D) that take part in a prediction; `None`: it has no such."""
    if getattr(pool, name, None) is None:
        return None
    rows = pool.rows(name) if name in pool.row_axes else getattr(pool, name)
    return rows[..., : pool.rows_in_use, :]


def score_images(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], scores: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Scores of images, all that an adapter has in one pass.

    Args:
        model: As `ImageScorer` has it.
        batches: `pixel_values` (B, channels, height, width) of each, and `query` (B, Q) where it is known; other
            entries are not read. A `DataLoader`, for instance.
        scores: Names of scores. `None`: all that the adapter has.

    Returns:
        Name -> float64 array (images,).

    Raises:
        ValueError: As `ImageScorer`; or there are no images.

    Example:
        >>> known = score_images(model, test_loader)      # doctest: +SKIP
        >>> other = score_images(model, other_loader)     # doctest: +SKIP
        >>> auroc(known["energy"], other["energy"])       # doctest: +SKIP
        0.87
    """
    return scores_of(ImageScorer(model, scores), batches)


def scores_of(scorer: ImageScorer, batches: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """`score_images` with a scorer that is made already."""
    device = next(scorer.model.parameters()).device
    found: dict[str, list[torch.Tensor]] = {name: [] for name in scorer.scores}
    for batch in batches:
        query = batch.get("query")
        scored = scorer(batch["pixel_values"].to(device), None if query is None else query.to(device))
        for name, values in scored.items():
            found[name].append(values.double().cpu())
    if not all(found.values()):
        raise ValueError("batches holds no images, so there is nothing to score. Give some.")
    return {name: torch.cat(values).numpy() for name, values in found.items()}


# ------------------------------------------------------------------------------------------------------- separation


def auroc(known_scores: ArrayLike, unknown_scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a known image's score is above an unknown one's, equal ones counting
    half. 0.5 is chance, 1 is perfect.

    Args:
        known_scores: Scores of images of classes learnt, (N,).
        unknown_scores: Scores of other images, (M,).

    Raises:
        ValueError: No scores, or scores that are not numbers.

    Example:
        >>> auroc([0.9, 0.8, 0.4], [0.5, 0.1])
        0.8333333333333334
    """
    known, unknown = _checked(known_scores, unknown_scores)
    ranks = rankdata(np.concatenate([known, unknown]))  # ties get their mean rank
    pairs = ranks[: len(known)].sum() - len(known) * (len(known) + 1) / 2  # Mann-Whitney's U
    return float(pairs / (len(known) * len(unknown)))


def false_positive_rate_at(
    known_scores: ArrayLike, unknown_scores: ArrayLike, true_positive_rate: float = 0.95
) -> float:
    """Share of unknown images that are taken for known at the highest threshold that keeps so many known ones.

    Args:
        known_scores: Scores of images of classes learnt, (N,).
        unknown_scores: Scores of other images, (M,).
        true_positive_rate: Share of known images whose score is at the threshold or above, above 0 and at most 1.

    Raises:
        ValueError: As `auroc`; or another rate.

    Example:
        >>> false_positive_rate_at([0.9, 0.8, 0.4], [0.5, 0.1], 0.6)
        0.0
    """
    known, unknown = _checked(known_scores, unknown_scores)
    if not 0 < true_positive_rate <= 1:
        raise ValueError(
            f"true_positive_rate is {true_positive_rate}, but must be above 0 and at most 1, such as 0.95."
        )
    # Less than one image's share is rounding: 0.95 of 20 images are 19.
    kept = int(np.ceil(true_positive_rate * len(known) - 1e-9))
    threshold = np.sort(known)[len(known) - kept]
    return float(np.mean(unknown >= threshold))


def separation(known: Mapping[str, ArrayLike], unknown: Mapping[str, ArrayLike]) -> dict[str, dict[str, float]]:
    """AUROC and false positive rate at 95 % of each score, from what `score_images` gives of both kinds of images.

    Returns:
        Name of the score -> `auroc` and `false_positive_rate_at_95`, in the order of `known`.

    Example:
        >>> separation({"energy": [2.0, 3.0]}, {"energy": [1.0]})
        {'energy': {'auroc': 1.0, 'false_positive_rate_at_95': 0.0}}
    """
    return {
        name: {
            "auroc": auroc(scores, unknown[name]),
            "false_positive_rate_at_95": false_positive_rate_at(scores, unknown[name]),
        }
        for name, scores in known.items()
    }


def _checked(*scores: ArrayLike) -> list[np.ndarray]:
    arrays = [np.asarray(each, dtype=np.float64) for each in scores]
    for name, array in zip(("known_scores", "unknown_scores"), arrays, strict=True):
        if array.ndim != 1 or not array.size:
            raise ValueError(f"{name} has the shape {array.shape}, but must be one score an image. Give (images,).")
        if np.isnan(array).any():
            raise ValueError(
                f"{name} has {int(np.isnan(array).sum())} scores that are not numbers (NaN), which have no rank. "
                "Leave these images out; a backbone in float16 overflows, load it in bfloat16 or float32."
            )
    return arrays
