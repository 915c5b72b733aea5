"""Checkpoints of all kinds, as people have them, and what is said of those that cannot carry prompts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers
from backbone_cases import COMMON, FAMILIES, tiny_backbone
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_cases import images as pictures
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetForImageClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)
from tuner_cases import images, logits

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    LinearProbeConfig,
    RunResults,
    class_incremental,
)
from peft_cl.backbones import FAMILIES as KNOWN
from peft_cl.backbones import loader_of
from peft_cl.backbones.dinov3 import DINOv3ViTForImageClassification
from peft_cl.cli import main
from peft_cl.commands.sources import load_backbone
from peft_cl.strategies import EWC, ExperienceReplay, FineTuning, NearestClassMean
from peft_cl.tuners.base.digests import digest_of_weights


SMALL = {"prompt_length": 3, "g_layers": [0], "layers": [1, 2], "pool_size": 5}
CNNS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    ),
}


@pytest.mark.parametrize("config_class", [L2PConfig, DualPromptConfig, CodaPromptConfig])
@pytest.mark.parametrize("name", CNNS)
def test_a_convolutional_model_has_no_place_for_prompts(name, config_class):
    with pytest.raises(ValueError, match=r"prompts are read by self-attention, and it has none.*LinearProbeConfig"):
        get_peft_model(CNNS[name](), config_class())


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("preset", ["linear", "best"])
def test_a_head_on_the_features_of_a_convolutional_model(name, preset, tmp_path):
    set_seed(0)
    base = CNNS[name]().eval()
    plain = logits(base, images(size=32))
    model = get_peft_model(base, LinearProbeConfig.from_preset(preset)).eval()
    assert torch.equal(logits(model, images(size=32)), plain)
    trainer = ContinualTrainer(
        model,
        ContinualTrainingArguments(str(tmp_path / "run"), learning_rate=0.05, num_train_epochs=2, use_cpu=True),
        class_incremental({"train": pictures(8, 0), "test": pictures(4, 1)}, num_tasks=2),
        processing_class=ViTImageProcessorPil(size={"height": 32, "width": 32}),
    )
    trainer.train()
    assert trainer.metrics["average_accuracy"] > 1.2 / 6
    answers = logits(model, images(size=32))
    set_seed(0)
    loaded = PeftModel.from_pretrained(CNNS[name](), tmp_path / "run")
    torch.testing.assert_close(logits(loaded, images(size=32)), answers, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model.unload(), images(size=32)), plain)


def test_vit_mae_is_loaded_as_a_vit(tmp_path):
    set_seed(0)
    saved = ViTMAEForPreTraining(ViTMAEConfig(**COMMON, decoder_hidden_size=32, decoder_num_hidden_layers=1))
    saved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Load it with ViTForImageClassification.from_pretrained"):
        get_peft_model(saved, L2PConfig())
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loader_of(saved.config) is transformers.ViTForImageClassification
    model = load_backbone(str(tmp_path), "float32")
    for key, value in saved.vit.state_dict().items():
        assert torch.equal(model.vit.state_dict()[key], value), key
    assert logits(get_peft_model(model, L2PConfig(pool_size=5))).isfinite().all()


def test_dinov3_is_loaded_with_a_head_of_ours(tmp_path):
    set_seed(0)
    saved = DINOv3ViTModel(DINOv3ViTConfig(**COMMON)).eval()
    saved.save_pretrained(tmp_path / "base")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    assert type(model) is DINOv3ViTForImageClassification
    with torch.no_grad():
        tokens = saved(images()).last_hidden_state
        expected = model.classifier(
            torch.cat([tokens[:, 0], tokens[:, 1 + saved.config.num_register_tokens :].mean(1)], 1)
        )
        assert torch.equal(model(images()).logits, expected)
        assert torch.equal(model(images(), return_dict=False)[0], expected)
    loss = model(images(), labels=torch.tensor([0, 1, 2, 0])).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 2, 0])))
    model.save_pretrained(tmp_path / "head")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "head").eval()
    assert torch.equal(logits(again), expected)
    assert type(load_backbone(str(tmp_path / "base"), "float32")) is DINOv3ViTForImageClassification


def test_dinov3_draws_positions_in_training_alone():
    model = get_peft_model(tiny_backbone("dinov3_vit", pos_embed_rescale=2.0), CodaPromptConfig(layers=[2]))
    encoder = model.base_model.encoder
    first, again = (encoder.query(images()) for _ in range(2))
    assert torch.equal(first, again)  # a query is of the frozen model, whatever mode it is in
    model.train()
    with torch.no_grad():
        drawn = [model(images()).logits for _ in range(2)]
    assert not torch.equal(*drawn) and torch.equal(encoder.query(images()), first)


def test_siglip2_of_any_shape_is_refused_with_the_one_that_works():
    tower = {key: value for key, value in COMMON.items() if key not in ("image_size", "initializer_range")}
    model = Siglip2ForImageClassification(Siglip2Config(vision_config={**tower, "num_patches": 4}, num_labels=3))
    with pytest.raises(ValueError, match="NaFlex form.*google/siglip2-base-patch16-224"):
        get_peft_model(model, L2PConfig())


@pytest.mark.parametrize("shape", [(24, 24), (16, 32)])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("swin", "swinv2")])
def test_images_of_another_size(name, shape):
    """Where positions are learnt for one size, they are interpolated if the configuration says so."""
    pixels = torch.randn(4, 3, *shape, generator=torch.Generator().manual_seed(0))
    settings = {"pool_size": 5, "layers": [0, 1], "prompt_type": "prefix", "prompt_length": 4, "head_type": "cls"}
    base = tiny_backbone(name)
    expected = logits(base, pixels, **_interpolated(base))
    model = get_peft_model(base, L2PConfig(**settings, interpolate_pos_encoding=True)).eval()
    assert logits(model, pixels).shape == (4, 12)
    assert model.base_model.query(pixels).shape == (4, 24)
    probe = get_peft_model(tiny_backbone(name), LinearProbeConfig(interpolate_pos_encoding=True)).eval()
    torch.testing.assert_close(logits(probe, pixels), expected, rtol=0, atol=0)


def _interpolated(model) -> dict[str, bool]:
    """What the base model has to be told, if anything."""
    return {"interpolate_pos_encoding": True} if KNOWN[model.config.model_type].interpolates else {}


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_images_of_a_wrong_size_are_told_before_training(name, tmp_path):
    def make(size: int) -> ContinualTrainer:
        return ContinualTrainer(
            get_peft_model(tiny_backbone(name), LinearProbeConfig()),
            ContinualTrainingArguments(str(tmp_path), use_cpu=True),
            class_incremental({"train": pictures(8, 0), "test": pictures(4, 1)}, num_tasks=2),
            processing_class=ViTImageProcessorPil(size={"height": size, "width": size}),
        )

    make(16)
    if name == "dinov2":  # positions of any size
        make(24)
        with pytest.raises(ValueError, match="whole patches of 8 x 8"):
            make(20)
    else:
        with pytest.raises(ValueError, match="24 x 24 pixels, but the backbone reads 16 x 16"):
            make(24)


@pytest.mark.parametrize("name", ["clip", "dinov3_vit", "swin", "resnet", "convnext"])
@pytest.mark.parametrize("strategies", [[FineTuning], [FineTuning, EWC], [NearestClassMean], [ExperienceReplay]])
def test_comparison_methods_on_it(name, strategies, tmp_path):
    set_seed(0)
    base = CNNS[name]() if name in CNNS else tiny_backbone(name, num_labels=3)
    plain = digest_of_weights(base)
    trainer = ContinualTrainer(
        get_peft_model(base, LinearProbeConfig(train_mask=ExperienceReplay not in strategies)),
        ContinualTrainingArguments(str(tmp_path), learning_rate=0.01, use_cpu=True),
        class_incremental({"train": pictures(8, 0), "test": pictures(4, 1)}, num_tasks=2),
        strategy=[kind() for kind in strategies],
        processing_class=ViTImageProcessorPil(size=dict.fromkeys(("height", "width"), 32 if name in CNNS else 16)),
    )
    trainer.train()
    assert 0 <= trainer.metrics["average_accuracy"] <= 1
    changed = digest_of_weights(trainer.model.unload()) != plain
    assert changed == (FineTuning in strategies)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clip", ("--adapter.layers", "all")),
        ("dinov3_vit", ("--adapter.layers", "[0.0, 0.5]")),
        ("swinv2", ("--adapter.layers", "[2]")),
    ],
)
def test_the_command_trains_and_predicts_on_it(name, words, train, tmp_path, capsys):
    tiny_backbone(name).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    assert train("--model.name", str(tmp_path / "model"), *words) == 0
    for index, image in enumerate(pictures(1, 0)["image"][:2]):
        image.save(tmp_path / f"{index}.png")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "out"), str(tmp_path / "0.png"), str(tmp_path / "1.png")]) == 0
    shown = capsys.readouterr().out
    assert "0.png" in shown and "red" in shown


def test_the_command_computes_a_head_on_a_convolutional_model(train, tmp_path):
    CNNS["resnet"]().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    words = ("--method", "frozen", "--preset", "best", "--adapter", "null")
    assert train("--model.name", str(tmp_path / "model"), *words) == 0
    assert RunResults.load(tmp_path / "out").metrics["average_accuracy"] > 1.2 / 6


@pytest.mark.parametrize("config_class", [L2PConfig, DualPromptConfig, CodaPromptConfig])
@pytest.mark.parametrize(("given", "expected"), [([0.0, 0.5], [0, 1]), ([0.9, 0.95], [2]), ("all", [0, 1, 2])])
def test_layers_for_backbones_of_any_depth(config_class, given, expected, tmp_path):
    forms = {"prompt_type": "prefix", "prompt_length": 4, "head_type": "cls"} if config_class is L2PConfig else {}
    if config_class is DualPromptConfig:
        forms = {"g_layers": [0.0]}
    settings = config_class(layers=given, **forms)
    model = get_peft_model(tiny_backbone("dinov2"), settings)
    assert model.peft_config["default"].layers == expected and settings.layers == given
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_backbone("dinov2"), tmp_path)
    assert loaded.peft_config["default"].layers == expected


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "swin"])
def test_a_backbone_divided_over_devices(name, tmp_path):
    """`device_map`: here on the CPU, with one layer left on the disk until it is wanted."""
    tiny_backbone(name).save_pretrained(tmp_path)
    layer = {"vit": "vit", "dinov2": "dinov2.encoder", "clip": "vision_model.encoder", "swin": "swin.encoder"}[name]
    layer += ".layer.1" if name == "dinov2" else ".layers.1"
    tensors = [key for key, _ in (*tiny_backbone(name).named_parameters(), *tiny_backbone(name).named_buffers())]
    places = {key.rpartition(".")[0]: "cpu" for key in tensors if not key.startswith(layer)} | {layer: "disk"}
    divided = AutoModelForImageClassification.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "off"
    )
    models = [get_peft_model(base.eval(), DualPromptConfig(**SMALL)).eval() for base in (divided, tiny_backbone(name))]
    for model in models:
        model.begin_task(["a", "b"])
        set_seed(0)
        for value in model.parameters():
            if value.requires_grad:
                torch.nn.init.normal_(value)
    torch.testing.assert_close(*map(logits, models), rtol=1e-4, atol=1e-4)


@pytest.mark.data
def test_a_real_dinov2_checkpoint_gives_the_tokens_of_another_implementation():
    shared = Path(os.environ["PEFT_CL_DATA"]).parent
    model = AutoModelForImageClassification.from_pretrained(
        shared / "backbone" / "dinov2-small", num_labels=10, dtype="float32"
    ).eval()
    golden = load_file(shared / "golden" / "dinov2_onnx.safetensors")
    adapted = get_peft_model(model, DualPromptConfig()).eval()
    encoder = adapted.base_model.encoder
    with torch.no_grad():
        pixels = golden["pixel_values"].float()
        tokens = encoder.base_layer(pixels).last_hidden_state
        torch.testing.assert_close(tokens, golden["tokens"].float(), rtol=0, atol=1e-3)
        # The query, whose last layer is computed for the CLS token alone.
        torch.testing.assert_close(encoder.query(pixels), golden["tokens"][:, 0].float(), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", FAMILIES)
def test_two_tasks_on_real_images(name, tmp_path):
    """Loss falls, the backbone stays as it is to the bit, and the adapter reloaded answers the same."""
    data = load_dataset(str(Path(os.environ["PEFT_CL_DATA"], "tiny-imagenet-cl")))
    label = "label" if "label" in data["train"].column_names else "labels"
    small = {split: data[split].filter(lambda row: row < 6, input_columns=[label]) for split in ("train", "test")}
    base = tiny_backbone(name)
    before = digest_of_weights(base)
    config = CodaPromptConfig(components_per_task=3, prompt_length=4, layers="all")
    trainer = ContinualTrainer(
        get_peft_model(base, config),
        ContinualTrainingArguments(
            str(tmp_path), num_train_epochs=3, learning_rate=0.01, logging_steps=5, use_cpu=True, disable_tqdm=True
        ),
        class_incremental(small, num_tasks=2),
        processing_class=ViTImageProcessorPil(size={"height": 16, "width": 16}),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model = trainer.model.eval()
    answers = logits(model)
    loaded = PeftModel.from_pretrained(tiny_backbone(name), tmp_path)
    torch.testing.assert_close(logits(loaded), answers, rtol=1e-4, atol=1e-4)
    assert digest_of_weights(model.unload()) == before
