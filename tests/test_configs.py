"""Settings: presets, help texts, and bad ones refused before anything is trained."""

from __future__ import annotations

import doctest
from dataclasses import fields

import pytest
from peft import PeftConfig, get_peft_model
from refused_cases import BAD_SETTINGS
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTModel,
    YolosConfig,
    YolosModel,
)
from tuner_cases import CASES, METHODS, config, images, logits, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig
from peft_cl.backbones import Geometry
from peft_cl.tuners.base import config as base_config
from peft_cl.tuners.coda import config as coda_config
from peft_cl.tuners.dualprompt import config as dualprompt_config
from peft_cl.tuners.l2p import config as l2p_config
from peft_cl.tuners.linear_probe import config as linear_probe_config


CONFIGS = (L2PConfig, DualPromptConfig, CodaPromptConfig, LinearProbeConfig)
PRESETS = [(config_class, preset) for config_class in CONFIGS for preset in config_class.presets]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_is_explained(config_class):
    own = {field.name for field in fields(config_class)} - {field.name for field in fields(PeftConfig)}
    for field in fields(config_class):
        if field.name in own:
            assert len(field.metadata["help"]) > 10, field.name
    assert config_class.__doc__ and "Example" in config_class.__doc__


@pytest.mark.parametrize(("config_class", "preset"), PRESETS)
def test_presets_are_valid_and_can_be_changed(config_class, preset):
    settings = config_class.from_preset(preset, train_mask=False, head_init="trunc_normal")
    assert settings.train_mask is False and settings.head_init == "trunc_normal"
    for name, value in config_class.presets[preset].items():
        assert name == "head_init" or getattr(settings, name) == value
    assert preset in config_class.__doc__
    assert config_class(**settings.to_dict()).to_dict() == settings.to_dict()


def test_the_papers_constants():
    paper = L2PConfig.from_preset("paper")
    assert (paper.pool_size, paper.prompt_length, paper.top_k, paper.pull_coefficient) == (10, 5, 5, 0.5)
    google = L2PConfig.from_preset("google")
    assert (google.prompt_length, google.top_k, google.pull_coefficient, google.batchwise_prompt) == (10, 4, 1.0, True)
    dual = DualPromptConfig.from_preset("paper")
    assert (dual.g_layers, dual.layers, dual.g_prompt_length, dual.prompt_length) == ([0, 1], [2, 3, 4], 5, 5)
    assert DualPromptConfig.from_preset("imagenet-r").prompt_length == 20
    coda = CodaPromptConfig.from_preset("paper")
    assert (coda.components_per_task, coda.prompt_length, coda.layers) == (10, 8, [0, 1, 2, 3, 4])
    assert coda.orthogonality_coefficient == 0.1
    assert CodaPromptConfig.from_preset("official").orthogonality_coefficient == 0.0


@pytest.mark.parametrize("config_class", [L2PConfig, DualPromptConfig, CodaPromptConfig, LinearProbeConfig])
def test_only_what_an_earlier_version_could_not_read_is_written_in_format_2(config_class):
    assert config_class().format_version == 1
    best = config_class.from_preset("best")
    assert best.format_version == 2 and best.head != "linear"


@pytest.mark.parametrize(
    ("hidden_size", "num_layers", "expected"),
    [(192, 6, 6), (192, 12, 6), (24, 3, 3), (768, 12, 2), (1024, 24, 1), (4096, 40, 1)],
)
def test_how_many_layers_a_head_sees_follows_from_the_width(hidden_size, num_layers, expected):
    settings = LinearProbeConfig.from_preset("best")
    settings.set_head_layers(Geometry(hidden_size, num_layers))
    assert settings.head_layers == expected
    given = LinearProbeConfig.from_preset("best", head_layers=4)
    given.set_head_layers(Geometry(hidden_size, num_layers))
    assert given.head_layers == min(4, num_layers)


def test_presets_are_not_shared():
    first = CodaPromptConfig.from_preset("best")
    first.head_options["query_options"]["shrinkage"] = 0.5
    assert CodaPromptConfig.from_preset("best").head_options["query_options"]["shrinkage"] == 0.1


def test_layers_are_sorted_and_none_means_all():
    assert CodaPromptConfig(layers=(4, 0, 2)).layers == [0, 2, 4]
    assert DualPromptConfig(g_layers=[], layers=range(2)).layers == [0, 1]
    shared = CodaPromptConfig(layers=None)
    model = get_peft_model(tiny(), shared)
    assert model.peft_config["default"].layers == [0, 1, 2] and shared.layers is None


@pytest.mark.parametrize(("config_class", "settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_an_unknown_preset_is_refused(config_class):
    with pytest.raises(ValueError, match=f"{config_class.__name__} has no preset 'finest'; choose one of"):
        config_class.from_preset("finest")


@pytest.mark.parametrize("module", [base_config, l2p_config, dualprompt_config, coda_config, linear_probe_config])
def test_examples_in_docstrings_are_true(module):
    result = doctest.testmod(module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.attempted and not result.failed


# ----------------------------------------------------------------------------------------------- base models


def small(config_class, model_class, **sizes):
    return model_class(config_class(num_labels=3, **sizes))


VIT_SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
UNSUPPORTED = {
    "ResNet": lambda: small(
        ResNetConfig, ResNetForImageClassification, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"
    ),
    "PoolFormer": lambda: small(PoolFormerConfig, PoolFormerForImageClassification, hidden_sizes=[8] * 4),
    "YolosModel": lambda: YolosModel(YolosConfig(**VIT_SIZES)),
    "Bert": lambda: small(BertConfig, BertForSequenceClassification, vocab_size=9, **VIT_SIZES),
    "ViTModel": lambda: ViTModel(tiny().config),
    "WithTeacher": lambda: small(DeiTConfig, DeiTForImageClassificationWithTeacher, image_size=32, **VIT_SIZES),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in METHODS for kind in UNSUPPORTED if (name, kind) != ("linear-probe", "ResNet")],
)
def test_models_that_cannot_be_prompted_are_refused(name, kind):
    base = UNSUPPORTED[kind]()
    modules = [type(module) for module in base.modules()]
    loader = "DeiTForImageClassification" if kind == "WithTeacher" else "AutoModelForImageClassification"
    message = {
        "ResNet": "it has none.*Choose one of .*SwinForImageClassification.*LinearProbeConfig",
        "PoolFormer": "it has none",
        "YolosModel": r"its attention \(YolosAttention\) is of a form.*examples/custom_backbone.py",
        "Bert": r"its attention \(BertAttention\)",
    }.get(kind, rf"(ViT|DeiT)ForImageClassification\. Load it with {loader}")
    if name == "linear-probe" and kind in ("PoolFormer", "YolosModel", "Bert"):
        message = "gives no features that a head could read"
    with pytest.raises(ValueError, match=rf"{kind}.*{message}"):
        get_peft_model(base, config(name))
    assert [type(module) for module in base.modules()] == modules and not base._forward_hooks


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "l2p-deep",
            {"layers": [1, 3]},
            r"layers \[3\] are out of range: the base model has 3 layers, counted 0 to 2",
        ),
        ("dualprompt", {"g_layers": [0, 5]}, r"layers \[5\] are out of range.*DualPromptConfig"),
        ("coda", {"layers": [0, 7, 9]}, r"layers \[7, 9\] are out of range"),
        ("coda", {"components_per_task": 25}, "25 new rows of 24 numbers cannot be orthogonal"),
        ("l2p", {"target_modules": ["q_proj"]}, r"target_modules is \['q_proj'\].*\['vit', 'classifier'\].*at None"),
    ],
)
def test_settings_that_do_not_fit_the_base_model_are_refused(name, settings, message):
    base = tiny()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(name, **settings))
    assert [type(module) for module in base.modules()] == [type(module) for module in tiny().modules()]


def test_a_refused_adapter_leaves_the_others_alone():
    model = get_peft_model(tiny(), config("coda"))
    expected = logits(model)
    with pytest.raises(ValueError, match="out of range"):
        model.add_adapter("second", config("coda", layers=[9]))
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("second", config("l2p"))
    assert list(model.peft_config) == ["default"]
    assert (logits(model) == expected).all() and model(images()).logits.shape == (4, 12)


def test_the_matrix_covers_every_preset_that_changes_the_form():
    """A new preset that switches a mechanism belongs into the matrix of the tests."""
    covered = {(config_class, preset) for config_class, preset, _ in CASES.values()}
    values_only = {(L2PConfig, "google"), (L2PConfig, "jhlee"), (L2PConfig, "paper")} | {
        (DualPromptConfig, "paper"),
        (DualPromptConfig, "imagenet-r"),
        (CodaPromptConfig, "official"),
        (LinearProbeConfig, "linear"),
        # The heads and what becomes of prompts under them have tests of their own (`test_head_adapters.py`).
        *(
            (config_class, "best")
            for config_class in (L2PConfig, DualPromptConfig, CodaPromptConfig, LinearProbeConfig)
        ),
    }
    assert set(PRESETS) <= covered | values_only


def test_the_advice_for_a_distilled_deit_works(tmp_path):
    from transformers import (
        AutoModelForImageClassification,
        DeiTConfig,
        DeiTForImageClassification,
        DeiTForImageClassificationWithTeacher,
    )

    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    config = DeiTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    distilled = AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Load it with DeiTForImageClassification\.from_pretrained\(name\)"):
        get_peft_model(distilled, CodaPromptConfig())
    assert get_peft_model(DeiTForImageClassification.from_pretrained(tmp_path), CodaPromptConfig())
