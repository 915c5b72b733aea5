"""Backbones of timm in transformers' wrapper: run where timm is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tuner_cases import METHODS, adapter_parameters, begin, config, images, labels, logits

from peft_cl import L2PConfig, LinearProbeConfig


pytestmark = pytest.mark.timm

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
#: Name -> (architecture, arguments).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit-mean": ("vit_base_patch16_siglip_gap_224", VIT),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", VIT),
    "eva02": ("eva02_tiny_patch14_224", VIT),
    "dinov3": ("vit_small_patch16_dinov3", VIT),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 16, "patch_size": 2, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4},
    ),
}
NO_TOKENS = {"eva02": "rotary positions", "dinov3": "rotary positions", "swin": "windows"}


def make(name: str, architecture: str | None = None) -> Any:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    architecture, arguments = (architecture, {}) if architecture else MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TimmWrapperForImageClassification(
            TimmWrapperConfig(architecture=architecture, model_args=arguments, num_labels=12)
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", METHODS)
def test_the_methods(name, case, tmp_path):
    if case == "l2p" and name in NO_TOKENS:
        with pytest.raises(ValueError, match=f"prompt_type is 'tokens', but .*{NO_TOKENS[name]}"):
            get_peft_model(make(name), config(case))
        return
    base = make(name)
    names, plain = list(base.state_dict()), logits(base)
    model = get_peft_model(base, config(case)).eval()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-6)
    if case == "linear-probe":
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    for task in range(2):
        begin(model, task)
    answers = logits(model.eval())
    assert answers.shape == (4, 6) and answers.isfinite().all()
    torch.testing.assert_close(logits(model, images()[1:2]), answers[1:2], rtol=1e-4, atol=1e-4)
    gradients = []
    for checkpointed in (False, True):
        model.get_base_model().timm_model.base_layer.set_grad_checkpointing(checkpointed)
        model.train()
        model.zero_grad()
        torch.manual_seed(0)  # Swin drops paths
        model(pixel_values=images(), labels=labels(model)).loss.backward()
        gradients.append(
            {key: value.grad for key, value in adapter_parameters(model).items() if value.grad is not None}
        )
        model.eval()
    assert gradients[0]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make(name), tmp_path)), answers, rtol=0, atol=1e-6)
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == names
    torch.testing.assert_close(logits(unloaded), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_is_read_by_the_attention(name):
    """A prefix of the attention's own keys and values, all of them, halves each weight and changes nothing."""
    if name == "swin":
        return  # its windows have keys of their own each
    model = get_peft_model(make(name), config("dualprompt")).eval()
    encoder = model.base_model.encoder
    layer = encoder._layers[0]
    with torch.no_grad():
        hidden, arguments = encoder.family.embed(encoder.base_layer, images(1), False)
        kept = {}

        def keep(query, key, value, **options):
            kept.update(key=key, value=value)
            return original(query, key, value, **options)

        original = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = keep
        try:
            expected = encoder.family.run(layer, hidden, arguments)
        finally:
            torch.nn.functional.scaled_dot_product_attention = original
        rows = [kept[part].transpose(1, 2).flatten(2) for part in ("key", "value")]
        with encoder.family.prefixed(layer, hidden, *rows):
            found = encoder.family.run(layer, hidden, arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with encoder.family.prefixed(layer, hidden, *(row + 1 for row in rows)):
            assert not torch.allclose(encoder.family.run(layer, hidden, arguments), expected, atol=1e-2)


def test_a_convolutional_model_gives_features():
    with pytest.raises(ValueError, match="timm's ResNet"):
        get_peft_model(make("resnet", "resnet18"), L2PConfig())
    base = make("resnet", "resnet18")
    plain = logits(base, images(size=64))
    model = get_peft_model(base, LinearProbeConfig()).eval()
    torch.testing.assert_close(logits(model, images(size=64)), plain, rtol=1e-5, atol=1e-2)
    model.begin_task(["a", "b"])
    assert logits(model, images(size=64)).shape == (4, 2)


def test_a_distilled_deit_is_refused():
    with pytest.raises(ValueError, match="distilled DeiT with two heads"):
        get_peft_model(make("deit", "deit_tiny_distilled_patch16_224"), LinearProbeConfig())


def test_images_of_a_wrong_size_are_told_before_training(tmp_path):
    from trainer_cases import images as pictures
    from transformers import ViTImageProcessorPil

    from peft_cl import ContinualTrainer, ContinualTrainingArguments, class_incremental

    def trainer(size: int) -> ContinualTrainer:
        return ContinualTrainer(
            get_peft_model(make("vit"), LinearProbeConfig.from_preset("best")),
            ContinualTrainingArguments(str(tmp_path), use_cpu=True),
            class_incremental({"train": pictures(8, 0), "test": pictures(4, 1)}, num_tasks=2),
            processing_class=ViTImageProcessorPil(size={"height": size, "width": size}),
        )

    with pytest.raises(ValueError, match="24 x 24 pixels, but the backbone reads 16 x 16.*dynamic_img_size"):
        trainer(24)
    run = trainer(16)
    run.train()
    assert run.metrics["average_accuracy"] > 1.2 / 6
