"""What PEFT's own common tests ask of every method, asked of ours. docs/upstreaming.md says which do not apply.

PEFT's tests are not installed with it, so the checks are written anew; each names PEFT's in its docstring.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import register_peft_method
from safetensors.torch import load_file
from tuner_cases import METHODS, config, images, labels, logits, prompted, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig


CONFIGS = (L2PConfig, DualPromptConfig, CodaPromptConfig, LinearProbeConfig)
every_config = pytest.mark.parametrize("kind", CONFIGS)
every_method = pytest.mark.parametrize("name", METHODS)
PAGE = Path(__file__).parents[1] / "docs" / "upstreaming.md"


# ----------------------------------------------------------------------------------------------- configurations


@every_config
@pytest.mark.parametrize("task_type", [*TaskType, None])
def test_every_task_type_is_taken(kind, task_type):
    """test_valid_task_type"""
    assert kind(task_type=task_type).task_type == task_type


@every_config
def test_another_task_type_is_refused(kind):
    """test_invalid_task_type"""
    with pytest.raises(ValueError, match="Invalid task type: 'invalid-task-type'. Must be one of"):
        kind(task_type="invalid-task-type")


@every_config
def test_a_configuration_is_found_by_its_type(kind):
    """test_from_peft_type"""
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind().peft_type] is kind
    assert type(PeftConfig.from_peft_type(peft_type=kind().peft_type)) is kind


@every_config
def test_a_configuration_goes_to_disk_and_back(kind, tmp_path):
    """test_save_pretrained, test_from_json_file, test_to_dict"""
    saved = kind()
    saved.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    assert kind.from_pretrained(tmp_path).to_dict() == saved.to_dict()
    said = kind.from_json_file(path)
    path.write_text(json.dumps({**said, "runtime_config": {"ephemeral_gpu_offload": True}}))
    assert kind.from_json_file(path) == said and isinstance(saved.to_dict(), dict)


@every_config
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_configuration_is_copied(kind, duplicate):
    """test_config_copy, test_config_deepcopy, test_config_pickle_roundtrip"""
    assert duplicate(kind()).to_dict() == kind().to_dict()


# ----------------------------------------------------------------------------------------------- a model's life


@every_method
def test_a_model_has_what_a_peft_model_has(name):
    """_test_model_attr, _test_adapter_name"""
    model = get_peft_model(tiny(), config(name), adapter_name="test-adapter")
    assert all(hasattr(model, each) for each in ("save_pretrained", "from_pretrained", "push_to_hub"))
    assert any("test-adapter" in key for key, _ in model.named_parameters())


@every_method
def test_a_model_is_prepared_for_training(name):
    """_test_prepare_for_training"""
    base = prepare_model_for_kbit_training(tiny())
    assert not any(value.requires_grad for value in base.parameters())
    model = get_peft_model(base, config(name))
    embed = model.get_base_model().get_input_embeddings()
    assert not embed(images()).requires_grad
    model.enable_input_require_grads()
    assert embed(images()).requires_grad


@every_method
def test_memory_of_one_copy_is_enough(name, tmp_path):
    """_test_load_model_low_cpu_mem_usage"""
    prompted(name).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), tmp_path, torch_device="cpu", low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    empty = inject_adapter_in_model(config(name), tiny(), low_cpu_mem_usage=True)
    assert "meta" in {value.device.type for value in empty.parameters()}


@every_method
def test_what_is_saved_is_the_adapter_alone_and_comes_back(name, tmp_path):
    """_test_save_pretrained, _test_save_pretrained_selected_adapters, check_modelcard, check_config_json"""
    base = tiny()
    base.name_or_path = base.config._name_or_path = "user/tiny-vit"  # as from_pretrained sets them
    model = prompted(name, base)
    model.add_adapter("new_adapter", config(name))
    model.save_pretrained(tmp_path / "all")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(tiny(), tmp_path / "all")
        loaded.load_adapter(tmp_path / "all" / "new_adapter", "new_adapter")
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    for folder in (tmp_path / "all", tmp_path / "all" / "new_adapter"):
        assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in folder.iterdir()}
        assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    card = yaml.safe_load(re.search(r"---\n(.*?)\n---", (tmp_path / "all" / "README.md").read_text(), re.S)[1])
    assert card["library_name"] == "peft" and card["base_model"] == "user/tiny-vit"
    facts = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == "user/tiny-vit"
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert not (tmp_path / "one" / "new_adapter").exists()


@every_method
def test_names_that_hold_the_name_of_another_adapter(name, tmp_path):
    """_test_save_pretrained_adapter_name_substring"""
    model = prompted(name)
    count = len(get_peft_model_state_dict(model))
    for other in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(other, config(name))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == count


@every_method
def test_several_adapters_are_loaded_without_missing_keys(name, tmp_path):
    """_test_load_multiple_adapters"""
    prompted(name).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), tmp_path)
    for other in ("other", "yet-another"):
        assert model.load_adapter(tmp_path, adapter_name=other).missing_keys == []


@every_method
def test_a_given_configuration_is_what_an_adapter_is_loaded_with(name, tmp_path):
    """_test_from_pretrained_config_construction: PEFT asks for the same object. Ours is a copy, because an adapter
    writes its classes and tasks into its configuration, and a user may give one to several models."""
    model = prompted(name)
    model.save_pretrained(tmp_path)
    given = type(config(name)).from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, config=given)
    own = loaded.peft_config["default"]
    assert own.inference_mode and own is not given and own.classes == given.classes
    assert torch.equal(logits(loaded), logits(model))


@every_method
@pytest.mark.parametrize("is_active", [True, False])
def test_adapters_are_deleted(name, is_active):
    """_test_delete_adapter, _test_delete_inactive_adapter, _test_delete_unknown_adapter_raises"""
    model = prompted(name)
    model.add_adapter("delete_me", config(name))
    with pytest.raises(ValueError, match="Adapter unknown-adapter does not exist"):
        model.delete_adapter("unknown-adapter")
    if is_active:
        model.set_adapter("delete_me")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another adapter becomes active
        for gone, active in (("delete_me", ["default"]), ("default", [])):
            model.delete_adapter(gone)
            assert gone not in model.peft_config and model.active_adapters == active
            for layer in (each for each in model.modules() if isinstance(each, BaseTunerLayer)):
                assert gone not in layer.entries
    assert torch.equal(logits(model.base_model), logits(tiny()))


@every_method
def test_unloading_leaves_nothing_of_peft(name):
    """_test_unload_adapter, _test_disable_adapter"""
    model = prompted(name)
    with_adapter = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny()))
    assert torch.equal(logits(model), with_adapter)
    base = model.unload()
    assert not any(isinstance(module, (BaseTunerLayer, BaseTuner)) for module in base.modules())
    assert not hasattr(base, "peft_config") and base.state_dict().keys() == tiny().state_dict().keys()


@every_method
def test_the_weights_of_the_base_are_read_and_set_under_their_own_names(name):
    """_test_get_base_model_state_dict"""
    original = {key: value.clone() for key, value in tiny().state_dict().items()}
    model = prompted(name)
    found = get_base_model_state_dict(model)
    assert found.keys() == original.keys() and all(torch.equal(found[key], original[key]) for key in found)
    with torch.no_grad():
        for value in model.get_base_model().parameters():
            value.add_(0.1)
    result = set_base_model_state_dict(model, original, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    again = get_base_model_state_dict(model)
    assert all(torch.equal(again[key], original[key]) for key in again)


# ----------------------------------------------------------------------------------------------- training


@every_method
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_reaches_the_adapter_alone(name, use_reentrant):
    """_test_training, _test_training_gradient_checkpointing, _test_inference_safetensors (with test_saving.py)"""
    reached = []
    for checkpointing in (False, True):
        model = prompted(name).train()
        if checkpointing:
            model.prepare_model_for_gradient_checkpointing(model)
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(pixel_values=images(), labels=labels(model)).loss.backward()
        found = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        assert all(model.prefix in key and grad.isfinite().all() for key, grad in found.items())
        reached.append({key for key, grad in found.items() if grad.abs().sum() > 0})
    assert reached[0] == reached[1] and reached[0]


@every_method
def test_adapters_are_mixed_in_a_batch(name):
    """_test_mixed_adapter_batches"""
    model = prompted(name)
    model.add_adapter("adapter1", config(name))
    answers = {"default": logits(model, images(6))}
    with model.disable_adapter():
        answers["__base__"] = logits(model, images(6))
    model.set_adapter("adapter1")
    answers["adapter1"] = logits(model.eval(), images(6))
    names = ["__base__", "default", "adapter1"]
    mixed = logits(model, images(6), adapter_names=names * 2)
    for place, each in enumerate(names):
        found = mixed[place::3]
        known = found[~found.isneginf()].view(2, -1)
        torch.testing.assert_close(known, answers[each][place::3], atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- the page


def test_the_page_tells_of_every_check_here():
    """Its list of PEFT's checks and the docstrings here agree."""
    asked = set(
        re.findall(
            r"\b_?test_[a-z0-9_]+\b|\bcheck_[a-z_]+\b",
            " ".join(value.__doc__ for key, value in globals().items() if key.startswith("test_") and value.__doc__),
        )
    )
    said = set(re.findall(r"`(_?test_[a-z0-9_]+|check_[a-z_]+)`", PAGE.read_text()))
    assert {each for each in asked if not each.startswith("test_saving")} <= said


def test_what_the_page_says_of_registering_holds():
    """PEFT's own function takes ours where the enum has the member, as it would upstream."""
    assert {"L2P", "DUALPROMPT", "CODAPROMPT", "LINEARPROBE"} <= set(PeftType.__members__)
    with pytest.raises(KeyError, match="already PEFT method called 'l2p'"):
        register_peft_method(name="l2p", config_cls=L2PConfig, model_cls=BaseTuner, prefix="l2p_")
    with pytest.raises(ValueError, match="Unknown PEFT type NEVERHEARDOF, please add an entry"):
        register_peft_method(name="neverheardof", config_cls=L2PConfig, model_cls=BaseTuner, prefix="neverheardof_")
