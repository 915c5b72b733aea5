"""Similarity of queries and keys, selection, and the loss terms made of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cosine(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Cosine of each query with each key: (B, D) and (..., M, D) -> (..., B, M)."""
    return F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).transpose(-1, -2)


def compare(query: torch.Tensor, keys: torch.Tensor, kind: str) -> torch.Tensor:
    """`"cosine"`, or the plain `"dot"` product, of each query with each key, shaped as `cosine` has it."""
    return cosine(query, keys) if kind == "cosine" else query @ keys.transpose(-1, -2)


def batch_vote(selected: torch.Tensor, pool_size: int) -> torch.Tensor:
    """The batch's most often chosen rows, for every sample of it (official JAX `batchwise_prompt`).

    Args:
        selected: (..., B, N) rows chosen by each sample.
        pool_size: M.

    Returns:
        (..., B, N): the N rows with the most votes; of equal ones the lower row first.
    """
    votes = F.one_hot(selected.flatten(-2), pool_size).sum(dim=-2)
    winners = votes.argsort(dim=-1, descending=True, stable=True)[..., : selected.shape[-1]]
    return winners[..., None, :].expand_as(selected)


def pull_term(
    query: torch.Tensor,
    keys: torch.Tensor,
    similarity: torch.Tensor,
    selected: torch.Tensor,
    *,
    form: str,
    reduction: str,
) -> torch.Tensor:
    """The term that pulls selected keys towards their queries, summed over key sets.

    Args:
        query: (B, D).
        keys: (sets, M, D).
        similarity: (sets, B, M), their `cosine`, which the selection has computed already.
        selected: (sets, B, N) rows.
        form: `"cosine"`: minus the cosine, summed over the N (L2P, eq. 5, as the official code has it);
            `"cosine_distance"`: 1 - cosine, summed over the N (CODA-Prompt's DualPrompt);
            `"squared_distance"`: squared Euclidean distance, averaged over the N (the textbook form);
            `"mean_squared_distance"`: the same over D too (`F.mse_loss`).
        reduction: over the batch, `"mean"` or `"sum"`.
    """
    if form.endswith("squared_distance"):
        # Chosen from all distances, not from the keys: the gradient of a gather of rows has no fixed order of summing.
        distances = (keys[:, None] - query[:, None]).square().sum(-1)
        per_sample = distances.gather(-1, selected).mean(-1) / (query.shape[-1] if form.startswith("mean") else 1)
    else:
        chosen = similarity.gather(-1, selected)
        per_sample = (-chosen if form == "cosine" else 1 - chosen).sum(-1)
    per_batch = per_sample.mean(-1) if reduction == "mean" else per_sample.sum(-1)
    return per_batch.sum()


def selection_entropy_term(similarity: torch.Tensor) -> torch.Tensor:
    """Minus the entropy of the batch's mean selection, averaged over key sets; to be minimised.

    Counts of chosen rows have no gradient, so the selection is the softmax of the similarities (..., B, M).
    """
    mean = similarity.softmax(-1).mean(-2)
    return (mean * mean.clamp_min(1e-12).log()).sum(-1).mean()


def gram_sum(rows: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """What `rows` (sets, k, D) add, beside `past` rows (sets, n, D), to the sum of (R R' - I)^2, over all sets.

    Products among the past rows are left out: they are constant, and there are n^2 of them.
    """
    own = rows @ rows.transpose(-1, -2) - torch.eye(rows.shape[-2], device=rows.device)
    return own.square().sum() + 2 * (rows @ past.transpose(-1, -2)).square().sum()


def pair_sum(rows: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """The same of the absolute cosines of different rows."""
    rows, past = F.normalize(rows, dim=-1), F.normalize(past, dim=-1)
    own = (rows @ rows.transpose(-1, -2)).abs()
    return own.sum() - own.diagonal(dim1=-2, dim2=-1).sum() + 2 * (rows @ past.transpose(-1, -2)).abs().sum()


def product_sum(rows: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """The same of the absolute products of different rows, as they are."""
    own = (rows @ rows.transpose(-1, -2)).abs()
    return own.sum() - own.diagonal(dim1=-2, dim2=-1).sum() + 2 * (rows @ past.transpose(-1, -2)).abs().sum()


def signed_sum(rows: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """The same of the products of all rows with sign, of a row with itself too."""
    return rows.sum(-2).square().sum() + 2 * (rows.sum(-2) * past.sum(-2)).sum()


def cosine_sum(rows: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """The same of the cosines of different rows with sign: low where rows are diverse."""
    rows, past = F.normalize(rows, dim=-1), F.normalize(past, dim=-1)
    return signed_sum(rows, past) - rows.square().sum()


def evenness(selected: torch.Tensor, pool_size: int) -> float:
    """The entropy of the choices among the rows of a pool, 0 (one row alone) to 1 (all equally often)."""
    shares = torch.bincount(selected.flatten(), minlength=pool_size).double()
    shares = shares / shares.sum()
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    return float(entropy / torch.tensor(float(pool_size)).double().log()) if pool_size > 1 else 0.0
