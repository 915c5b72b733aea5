"""A trained adapter exports with its backbone, for any number of images."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from peft import get_peft_model
from torch import nn
from tuner_cases import FAMILIES, METHODS, images, prompted, tiny

from peft_cl import CodaPromptConfig, LinearProbeConfig


class Logits(nn.Module):
    """The model's logits alone, as a program gives them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


ANY_NUMBER = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}


def exported(model, example, strict=False):
    return torch.export.export(Logits(model).eval(), (example,), dynamic_shapes=ANY_NUMBER, strict=strict).module()


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES[1:])]
)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "strict"])
def test_any_number_of_images(strict, name, family):
    model = prompted(name, family)
    program = exported(model, images(), strict)
    for count in (1, 7):
        batch = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(program(batch), model(batch).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [CodaPromptConfig, LinearProbeConfig])
def test_computed_heads_export_too(kind):
    words = {"layers": [0, 1], "prompt_length": 4} if kind is CodaPromptConfig else {}
    model = get_peft_model(tiny(), kind.from_preset("best", **words))
    model.begin_task(["a", "b", "c"])
    batch = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.base_model.observe(batch, torch.arange(30) % 3)
    model.base_model.head.active.fit()
    model.eval()
    program = exported(model, batch[:4])
    torch.testing.assert_close(program(batch[:7]), model(batch[:7]).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["coda", *(pytest.param(each, marks=pytest.mark.slow) for each in ("l2p", "dualprompt"))]
)
def test_onnx_of_any_number_of_images(name, tmp_path):
    model = prompted(name, FAMILIES[0]).eval()
    file = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model), (images(),), dynamo=True, dynamic_shapes=ANY_NUMBER, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file)
    for count in (1, 7):
        batch = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        (logits,) = session.run(None, {"pixel_values": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(batch).logits, atol=1e-4, rtol=1e-3)
