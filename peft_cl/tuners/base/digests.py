"""Digests of weights, by which files know what they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
import xxhash
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


#: The 16-bit formats that a copy of a backbone may be loaded in, and the formats whose rounding to it is that of the
#: original weights: what one 16-bit format has rounded off, the other does not have.
ROUNDED_FROM = {
    "bfloat16": {torch.float32, torch.float64, torch.bfloat16},
    "float16": {torch.float32, torch.float64, torch.float16},
}


#: Attribute of a module whose weights are divided over processes: its digests, of when it was whole.
_KEPT = "_digests_of_the_whole"


def keep_digests(module: nn.Module) -> None:
    """Have the digests of a frozen module stay what they are now, when it is divided and no process has it whole."""
    kept = {name: function(module) for name, function in DIGESTS.items()}
    setattr(module, _KEPT, kept)


def digest_of_weights(module: nn.Module) -> str:
    """A digest of every parameter and buffer, by name, shape, dtype and content."""
    kept = getattr(module, _KEPT, None)
    return kept["weights"] if kept else digest_of_tensors(module.state_dict().items())


def digest_in_bfloat16(module: nn.Module) -> str:
    """A digest of every parameter and buffer, the same in float32 and in bfloat16; 16 hexadecimal digits."""
    if kept := getattr(module, _KEPT, None):
        return kept["bfloat16"]
    weights = plain_tensors(module.state_dict().items())
    return digest_of_tensors((name, value.to(torch.bfloat16)) for name, value in weights)[:16]


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


def base_digests(module: nn.Module, wanted: Iterable[str] = tuple(ROUNDED_FROM)) -> dict[str, str]:
    """What a backbone's weights are when they are rounded to 16 bits, by the format's name.

    Copies of one backbone in float32, bfloat16 and float16 have the digest of a format in common that both of them can
    be rounded to. It knows neither names nor order, which change with the version of transformers. Against accident,
    not against malice: the hash is fast (ViT-B/16: under a second), and not a cryptographic one.

    Args:
        module: the backbone; weights that are quantised, or not in memory, have no digest.
        wanted: the formats.

    Returns:
        A digest of 16 hexadecimal digits for each format that the weights can be rounded to; none where they cannot be
        read.
    """
    if kept := getattr(module, _KEPT, None):
        return {name: kept["base"][name] for name in wanted if name in kept["base"]}
    state = module.state_dict()
    tensors = [tensor for tensor in state.values() if tensor.is_floating_point()]
    quantised = any(type(each) not in (torch.Tensor, nn.Parameter) for each in state.values()) or any(
        not parameter.is_floating_point() for parameter in module.parameters()
    )
    if quantised or any(tensor.is_meta for tensor in tensors):
        return {}
    dtypes = {tensor.dtype for tensor in tensors}
    return {
        name: _digest_rounded(tensors, getattr(torch, name))
        for name in wanted
        if name in ROUNDED_FROM and dtypes <= ROUNDED_FROM[name]
    }


def is_another_base(saved: Mapping[str, str], module: nn.Module) -> bool:
    """Whether a backbone's weights are others than those with the digests `saved`; False where it cannot be told."""
    found = base_digests(module, saved)
    return any(saved[name] != digest for name, digest in found.items())


def _digest_rounded(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> str:
    parts = []
    for tensor in tensors:
        content = tensor.detach().to(dtype).cpu().contiguous()
        digest = xxhash.xxh3_128(f"{tuple(content.shape)}".encode())
        digest.update(content.view(-1).view(torch.uint8).numpy() if content.numel() else b"")
        parts.append(digest.digest())
    return xxhash.xxh3_64(b"".join(sorted(parts))).hexdigest()


DIGESTS = {"weights": digest_of_weights, "bfloat16": digest_in_bfloat16, "base": base_digests}
