"""The embedded backbone: it loads from the installed package alone, and is what its card says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_cl.assets import default_backbone


def test_backbone_computes_in_float32_unless_told_otherwise() -> None:
    """Its weights are stored in float16, which CPUs multiply ten times as slowly."""
    assert AutoModelForImageClassification.from_pretrained(default_backbone()).dtype == torch.float32


def test_backbone_classifies_an_image_into_100_named_classes() -> None:
    model = AutoModelForImageClassification.from_pretrained(default_backbone(), dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(default_backbone())
    # Neither square nor of the model's size: the processor brings it there.
    pixel_values = processor(Image.new("RGB", (100, 80), (200, 30, 30)), return_tensors="pt")["pixel_values"]

    with torch.inference_mode():
        logits = model.eval()(pixel_values).logits

    assert pixel_values.shape == (1, 3, 64, 64)
    assert logits.shape == (1, 100)
    assert logits.isfinite().all()
    assert len(set(model.config.id2label.values())) == 100
    assert model.config.id2label[0] == "goldfish"


def test_every_weight_of_the_file_is_loaded_and_none_is_made_up() -> None:
    _, report = AutoModelForImageClassification.from_pretrained(default_backbone(), output_loading_info=True)

    assert not any(report.values())


def test_weights_are_float16_and_small_enough_to_ship() -> None:
    weights = Path(default_backbone()) / "model.safetensors"

    with safe_open(weights, framework="pt") as file:
        types = {file.get_slice(name).get_dtype() for name in file.keys()}

    assert types == {"F16"}
    assert weights.stat().st_size < 6_000_000


def test_processor_loads_without_torchvision() -> None:
    # In a process of its own: where torchvision is installed, it must look absent before transformers asks for it.
    script = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor\n"
        "processor = AutoImageProcessor.from_pretrained(sys.argv[1])\n"
        "print(tuple(processor(Image.new('RGB', (64, 64)), return_tensors='np')['pixel_values'].shape))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, default_backbone()], capture_output=True, text=True, timeout=120
    )

    assert result.stdout.strip() == "(1, 3, 64, 64)", result.stderr
