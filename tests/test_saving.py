"""Adapters on disk: they come back equal through the stock functions, and what does not fit is refused by name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline
from tuner_cases import CASES, METHODS, begin, config, images, logits, prompted, step, tiny


every_case = pytest.mark.parametrize("name", CASES)
every_method = pytest.mark.parametrize("name", METHODS)
pytestmark = pytest.mark.filterwarnings("error:Found missing adapter keys")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def saved(tmp_path):
    """`saved(name, tasks, **overrides)`: the model, and the folder that it was saved in."""

    def save(name: str, tasks: int = 2, **overrides):
        model = prompted(name, tasks=tasks, **overrides)
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return save


def other_base(**overrides):
    """The frozen weights of `tiny()`, with another head and a random state that has moved on."""
    base = tiny(**overrides)
    base.load_state_dict({key: value for key, value in tiny().state_dict().items() if "vit" in key}, strict=False)
    torch.manual_seed(99)
    return base


# ----------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("tasks", [0, 1, 3])
@every_case
def test_an_adapter_comes_back_equal(name, tasks, saved):
    model, folder = saved(name, tasks)
    expected = logits(model)
    for num_labels in (2, 12, 1000):
        loaded = PeftModel.from_pretrained(other_base(num_labels=num_labels), folder)
        assert torch.equal(logits(loaded), expected)
        assert loaded.config.id2label == model.config.id2label
        assert loaded.config.num_labels == expected.shape[1]
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
        facts = json.loads((folder / CONFIG).read_text())
        assert [facts[key] for key in ("classes", "tasks", "rows_in_use")] == [
            getattr(model.peft_config["default"], key) for key in ("classes", "tasks", "rows_in_use")
        ]


@every_case
def test_a_loaded_adapter_can_learn_on(name, saved):
    model, folder = saved(name)
    loaded = PeftModel.from_pretrained(other_base(), folder, is_trainable=True)
    assert {key for key, value in loaded.named_parameters() if value.requires_grad} == {
        key for key, value in model.named_parameters() if value.requires_grad
    }
    for current in (model, loaded):
        torch.manual_seed(5)
        begin(current, 2)
        step(current)
    for (key, value), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if value.requires_grad:
            assert torch.equal(value, other) and torch.equal(value.grad, other.grad), key
    loaded.save_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(other_base(), folder)), logits(model.eval()))


@every_method
def test_an_adapter_loaded_for_inference_refuses_tasks(name, saved):
    loaded = PeftModel.from_pretrained(tiny(), saved(name)[1])
    with pytest.raises(ValueError, match="'default' was loaded for inference.*is_trainable=True"):
        loaded.begin_task(["cat"])
    assert loaded.peft_config["default"].num_tasks == 2


@pytest.mark.parametrize("name", ["l2p-textbook", "dualprompt", "coda", "linear-probe"])
def test_names_and_subfolders(name, saved, tmp_path):
    """Another name than it was saved under, and a model with two adapters saved as PEFT does."""
    model, folder = saved(name)
    loaded = PeftModel.from_pretrained(tiny(), folder, adapter_name="renamed")
    assert torch.equal(logits(loaded), logits(model)) and list(loaded.peft_config) == ["renamed"]
    model.load_adapter(folder, "second", is_trainable=True)
    model.set_adapter("second")
    begin(model, 2)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / WEIGHTS).is_file() and (tmp_path / "two" / "second" / WEIGHTS).is_file()
    second = PeftModel.from_pretrained(tiny(), tmp_path / "two" / "second")
    assert torch.equal(logits(second), expected) and second.config.num_labels == 9
    second = PeftModel.from_pretrained(tiny(), tmp_path / "two", subfolder="second")
    assert torch.equal(logits(second), expected)


@pytest.mark.parametrize("adapter_name", ["l2p", "pool", "vit"])
def test_unlucky_adapter_names(adapter_name, tmp_path):
    """Names that also occur in the tensors' own names."""
    model = get_peft_model(tiny(), config("l2p-textbook"), adapter_name=adapter_name)
    begin(model, 0)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / adapter_name)
    assert torch.equal(logits(loaded), logits(model))


@every_case
def test_loading_without_a_second_copy_in_memory(name, saved):
    model, folder = saved(name, 3)
    loaded = PeftModel.from_pretrained(tiny(), folder, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(value.is_meta for value in loaded.state_dict().values())


@every_case
def test_resuming_reloads_the_weights_in_place(name, saved):
    """What the Trainer does to resume: `load_adapter` onto the adapter that is there."""
    model, folder = saved(name)
    expected = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].num_tasks == 2


TENSORS = {
    "l2p": {"pool.prompts": (1, 6, 3, 24), "pool.keys": (1, 6, 24)},
    "l2p-deep": {"pool.prompts": (3, 6, 4, 24), "pool.keys": (3, 6, 24)},
    "l2p-textbook": {
        "pool.prompts": (1, 6, 3, 24),
        "pool.keys": (1, 6, 24),
        "pool.query_projection.0.weight": (24, 24),
        "pool.query_projection.0.bias": (24,),
        "pool.query_projection.2.weight": (24, 24),
        "pool.query_projection.2.bias": (24,),
    },
    "dualprompt": {
        "pool.g_prompts": (1, 2, 5, 24),
        "pool.prompts": (2, 2, 1, 3, 24),
        "pool.keys": (1, 1, 24),
        "pool.past_prompts": (2, 2, 1, 3, 24),
        "pool.past_keys": (1, 1, 24),
    },
    "coda": {
        "pool.prompts": (2, 2, 4, 24),
        "pool.keys": (2, 2, 24),
        "pool.attention": (2, 2, 24),
        "pool.past_prompts": (2, 2, 4, 24),
        "pool.past_keys": (2, 2, 24),
        "pool.past_attention": (2, 2, 24),
    },
    "linear-probe": {},
}


@pytest.mark.parametrize("name", TENSORS)
def test_the_files_tensors_keep_their_names(name, saved):
    """Adapters of today must load tomorrow: a change here is a change of the format."""
    model, folder = saved(name)
    prefix = model.base_model.prefix
    expected = {f"base_model.model.vit.{prefix}{key}": shape for key, shape in TENSORS[name].items()}
    expected[f"base_model.model.classifier.{prefix}head.weight"] = (6, 24)
    expected[f"base_model.model.classifier.{prefix}head.bias"] = (6,)
    found = load_file(folder / WEIGHTS)
    assert {key: tuple(value.shape) for key, value in found.items()} == expected
    assert {value.dtype for value in found.values()} == {torch.float32}
    facts = json.loads((folder / CONFIG).read_text())
    assert facts["format_version"] == 1 and facts["peft_type"] == prefix.rstrip("_").upper()


def test_selection_counts_are_kept(tmp_path):
    model = prompted("l2p", frequency_penalty=True).train()
    model(images())
    model.save_pretrained(tmp_path)
    counts = PeftModel.from_pretrained(tiny(), tmp_path).base_model.pool.chosen_now
    assert counts.sum() == 4 * 2 and torch.equal(counts, model.base_model.pool.chosen_now)


# ----------------------------------------------------------------------------------------------- other ways in


@every_case
def test_injection_without_a_peft_model(name, saved):
    model, folder = saved(name)
    settings = PeftConfig.from_pretrained(folder)
    assert type(settings) is CASES[name][0]
    base = inject_adapter_in_model(settings, tiny())
    set_peft_model_state_dict(base, load_peft_weights(folder))
    assert torch.equal(logits(base), logits(model)) and base.config.id2label == model.config.id2label


@every_case
def test_transformers_loads_the_adapter_by_its_folder(name, saved, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model, folder = saved(name, base=AutoModelForImageClassification.from_pretrained(tmp_path / "base"))
    expected = logits(model)
    assert torch.equal(logits(AutoPeftModel.from_pretrained(folder)), expected)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded), expected)
    assert loaded.config.id2label == model.config.id2label
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(tiny())) and loaded.config.num_labels == 12
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), expected) and loaded.config.num_labels == 6


def test_transformers_switches_adapters_and_their_labels(saved, tmp_path):
    first, folder = saved("coda")
    other = prompted("coda", tasks=1, seed=1)
    other.save_pretrained(tmp_path / "other")
    base = tiny()
    base.load_adapter(str(folder), "first")
    base.load_adapter(str(tmp_path / "other"), "other")
    for adapter_name, model in (("other", other), ("first", first)):
        base.set_adapter(adapter_name)
        assert torch.equal(logits(base), logits(model)) and base.config.id2label == model.config.id2label
    with pytest.raises(ValueError, match="one prompt adapter can be active at a time"):
        base.set_adapter(["first", "other"])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["l2p", "coda"])
def test_a_pipeline_names_the_adapters_classes(name, whole, saved):
    model = PeftModel.from_pretrained(other_base(num_labels=2), saved(name)[1])
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    inner = model if whole else model.get_base_model()
    classify = pipeline("image-classification", model=inner, image_processor=processor, device="cpu")
    image = Image.new("RGB", (20, 20), (200, 30, 90))
    answer = classify(image, top_k=6)
    scores = logits(model, processor(image, return_tensors="pt").pixel_values).softmax(-1)[0]
    assert {row["label"]: row["score"] for row in answer} == pytest.approx(
        {f"class {index}": score for index, score in enumerate(scores.tolist())}, abs=1e-6
    )


# ----------------------------------------------------------------------------------------------- what does not fit


def test_a_truncated_file_is_named(saved):
    _, folder = saved("coda")
    content = (folder / WEIGHTS).read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b""):
        (folder / WEIGHTS).write_bytes(damaged)
        message = rf"{re.escape(str(folder / WEIGHTS))} is damaged or cut short \({len(damaged)} bytes.*again"
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(tiny(), folder)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(file, saved):
    _, folder = saved("coda")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        PeftModel.from_pretrained(tiny(), folder)


@pytest.mark.parametrize(
    ("missing", "surplus", "message"),
    [
        ("keys", None, r"lacks \[.*codaprompt_pool.keys'\] and has \[\] that"),
        (None, "extra", r"lacks \[\] and has \[.*codaprompt_pool.extra'\] that"),
        ("keys", "extra", r"lacks \[.*codaprompt_pool.keys'\] and has \[.*codaprompt_pool.extra'\] that"),
    ],
)
def test_missing_and_unknown_tensors_are_named(missing, surplus, message, saved):
    _, folder = saved("coda")
    tensors = load_file(folder / WEIGHTS)
    if missing:
        del tensors[f"base_model.model.vit.codaprompt_pool.{missing}"]
    if surplus:
        tensors[f"base_model.model.vit.codaprompt_pool.{surplus}"] = torch.ones(1)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="CODA-Prompt adapter file " + message):
        PeftModel.from_pretrained(tiny(), folder)


@every_method
def test_a_base_model_of_another_width_is_refused(name, saved):
    _, folder = saved(name)
    with pytest.raises(ValueError, match=r"head.weight: file \(6, 24\), model \(6, 36\).*another width"):
        PeftModel.from_pretrained(tiny(hidden_size=36), folder)


def test_a_base_model_of_another_family_or_depth_is_refused(saved):
    _, folder = saved("dualprompt")
    with pytest.raises(ValueError, match=r"\['vit', 'classifier'\].*\['deit', 'classifier'\].*family"):
        PeftModel.from_pretrained(tiny("deit"), folder)
    with pytest.raises(ValueError, match=r"layers \[2\] are out of range: the base model has 2 layers"):
        PeftModel.from_pretrained(tiny(num_hidden_layers=2), folder)


@every_case
def test_other_shapes_are_not_loaded_in_place(name, saved):
    """Neither a larger nor a smaller checkpoint may cut or stretch a live adapter."""
    model, folder = saved(name)
    begin(model, 2)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"head.bias: file \(6,\), model \(9,\).*under a new adapter name"):
        model.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"head.bias: file \(9,\), model \(6,\)"):
        prompted(name).load_adapter(folder, "default", is_trainable=True)
    other = prompted(name)
    other.load_adapter(folder, "larger")
    other.set_adapter("larger")
    assert torch.equal(logits(other), expected)


def test_an_adapter_of_a_newer_format_is_refused(saved):
    _, folder = saved("coda")
    facts = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**facts, "format_version": 5, "new_option": "on"}))
    with (
        pytest.raises(ValueError, match="format_version is 5.*formats up to 4.*newer peft_cl.*Upgrade"),
        pytest.warns(UserWarning, match="new_option"),
    ):
        PeftModel.from_pretrained(tiny(), folder)
