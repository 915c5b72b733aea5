"""Backbones whose weights a library has quantised: run where the library is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_cases import FAMILIES, tiny_backbone
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from tuner_cases import adapter_parameters, begin, config, images, labels, logits


#: What a library itself cannot load, or run, of these tiny models.
NOT_LOADED = {("torchao", "clip"), ("bitsandbytes", "swinv2")}


def quantised(library: str, folder: str) -> Any:
    kept = {"modules_to_not_convert": ["classifier"]}
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig(), **kept)
    elif library == "quanto":
        settings = QuantoConfig(weights="int8", **kept)
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForImageClassification.from_pretrained(folder, quantization_config=settings)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "library",
    [pytest.param(each, marks=getattr(pytest.mark, each)) for each in ("torchao", "quanto", "bitsandbytes")],
)
def test_prompts_are_learnt_on_it(library, name, tmp_path):
    if (library, name) in NOT_LOADED:
        with pytest.raises(RuntimeError):
            tiny_backbone(name).save_pretrained(tmp_path)
            logits(quantised(library, tmp_path))
        return
    tiny_backbone(name).save_pretrained(tmp_path / "base")
    model = get_peft_model(quantised(library, tmp_path / "base"), config("coda"))
    torch.manual_seed(0)
    begin(model, 0)
    model.train()
    model(pixel_values=images(), labels=labels(model)).loss.backward()
    learnt = [value for value in adapter_parameters(model).values() if value.requires_grad]
    assert all(value.grad.isfinite().all() and value.dtype == torch.float32 for value in learnt)
    answers = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised(library, tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), answers, rtol=1e-3, atol=1e-3)
