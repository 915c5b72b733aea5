"""Prefixes in attention, and the length of keys that a CPU's kernels are fast at."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from tuner_cases import begin, images, prompted, tiny

from peft_cl.backbones.attention import prefixed


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("boolean", [True, False])
def test_a_masked_attention_reads_its_prefix(implementation, boolean):
    """Families with a mask (relative positions) hand one over; it must not hide the prefix, nor uncover tokens."""
    base = tiny(attn_implementation="sdpa" if boolean else implementation)  # eager adds masks, so they are numbers
    attention = base.vit.layers[0].attention
    hidden, keys, values = torch.randn(2, 5, 24), torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    readable = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    readable[..., 4] = False
    mask = readable if boolean else torch.zeros(2, 1, 5, 5).masked_fill(~readable, -torch.inf)
    with prefixed(attention, hidden, keys, values):
        masked, without = attention(hidden, mask)[0][:, :4], attention(hidden[:, :4])[0]
    torch.testing.assert_close(masked, without)
    assert attention.config is base.config
    assert not torch.allclose(without, attention(hidden[:, :4])[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_prefix_is_what_the_paper_says(implementation):
    """Rows in front of the projected keys and values, head by head (DualPrompt, eq. 4)."""
    attention = tiny(attn_implementation=implementation).vit.layers[0].attention
    hidden, keys, values = torch.randn(2, 5, 24), torch.randn(1, 3, 24), torch.randn(1, 3, 24)
    q, k, v = (project(hidden) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for head in (slice(0, 12), slice(12, 24)):
        all_keys, all_values = (
            torch.cat([part.expand(2, -1, -1), own], 1)[..., head] for part, own in ((keys, k), (values, v))
        )
        heads.append((q[..., head] @ all_keys.transpose(1, 2) / math.sqrt(12)).softmax(-1) @ all_values)
    with prefixed(attention, hidden, keys, values):
        found = attention(hidden)[0]
    torch.testing.assert_close(found, attention.o_proj(torch.cat(heads, -1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("tokens", [28, 45, 46, 48, 60, 540])
def test_keys_made_up_to_a_length_that_kernels_are_fast_at_change_nothing(monkeypatch, tokens, rows, half):
    """sdpa on a CPU gets a multiple of 16 keys where that pays; results and gradients are those without."""
    dtype = torch.bfloat16 if half else torch.float64
    shapes = [(2, tokens, 24), *([(1, rows, 24), (2, rows, 24)] if rows else [])]
    hidden, *prefix = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    attention = tiny(attn_implementation="sdpa").vit.layers[0].attention.to(dtype)
    found = {}
    for block in (1, 16):
        monkeypatch.setattr(f"{prefixed.__module__}.KEY_BLOCK", block)
        with KeyLengths() as lengths, prefixed(attention, hidden, *prefix):
            output = attention(hidden)[0]
        found[block] = (output, *torch.autograd.grad(output.square().sum(), [hidden, *prefix]))
    tolerance = 0.03 if half else 1e-10
    scale = max(part.abs().max().item() for part in found[1])
    torch.testing.assert_close(found[16], found[1], atol=tolerance * scale, rtol=tolerance)
    length = tokens + rows
    missing = -length % 16
    expected = 16 * missing <= length < 512 and (half or rows > 0)
    assert lengths.seen == [length + missing if expected else length]


def test_an_implementation_of_the_users_own_gets_no_spare_keys():
    """It may know no masks, as a ViT has none, whatever name it goes by."""
    lengths = []

    def own(module, query, key, value, attention_mask, **kwargs):
        lengths.append((key.shape[2], attention_mask))
        return value.transpose(1, 2), None

    attention = tiny(attn_implementation="sdpa").vit.layers[0].attention.bfloat16()
    hidden = torch.randn(2, 46, 24).bfloat16()
    AttentionInterface.register("sdpa", own)
    try:
        with prefixed(attention, hidden):
            attention(hidden)
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert lengths == [(46, None)]


def test_an_attention_of_the_users_own_class_takes_prompts():
    """Its eager function is its parent's: the class lies in a module without one."""
    model = prompted("coda", tasks=2)
    begin(model, 0)
    expected = model(images()).logits
    for layer in model.base_model.encoder.base_layer.layers:
        layer.attention.__class__ = type("Own", (type(layer.attention),), {"__module__": __name__})
    torch.testing.assert_close(model(images()).logits, expected)


class KeyLengths(TorchDispatchMode):
    """How many keys torch's fused attention was given, call by call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(function):
            self.seen.append(args[1].shape[2])
        return function(*args, **(kwargs or {}))
