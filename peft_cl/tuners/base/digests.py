"""Digests of weights, by which files know what they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def digest_of_weights(module: nn.Module) -> str:
    """A digest of every parameter and buffer, by name, shape, dtype and content."""
    return digest_of_tensors(module.state_dict().items())


def digest_of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of named tensors, by name, shape, dtype and content, in their order."""
    digest = hashlib.sha256()
    for name, tensor in plain_tensors(tensors):
        content = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(content.shape)} {content.dtype}".encode())
        digest.update(content.view(-1).view(torch.uint8).numpy() if content.numel() else b"")
    return digest.hexdigest()


def plain_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors, those that stand for others (quantised by torchao, for instance) in their parts."""
    for name, tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            parts, _ = tensor.__tensor_flatten__()
            yield from plain_tensors((f"{name}.{part}", getattr(tensor, part)) for part in parts)
        else:
            yield name, tensor
