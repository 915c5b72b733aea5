"""Adapters come and go: unload, merge, and several of them on one base model."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from tuner_cases import CASES, FAMILIES, METHODS, config, gradients, images, logits, prompted, step, tiny


every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("name", METHODS)


@every_family
@every_case
def test_unload_gives_the_base_model_back(name, family):
    base = tiny(family)
    modules = [type(module) for module in base.modules()]
    model = prompted(name, base)
    assert base.accepts_loss_kwargs is False
    assert model.unload() is base
    assert [type(module) for module in base.modules()] == modules
    assert not base._forward_hooks and not base._forward_pre_hooks and not hasattr(base, "peft_config")
    assert "accepts_loss_kwargs" not in vars(base) and base.num_labels == 12
    assert base.config.id2label == tiny(family).config.id2label
    assert torch.equal(logits(base), logits(tiny(family)))
    assert torch.equal(logits(prompted(name, base)), logits(prompted(name, family)))


def test_unload_restores_a_setting_of_the_base_model():
    base = tiny()
    base.accepts_loss_kwargs = True
    assert prompted("l2p", base).unload().accepts_loss_kwargs is True


@every_method
def test_merging_is_refused_with_the_way_out(name):
    model = prompted(name)
    expected = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match=r"cannot be merged.*call `unload\(\)`"):
            merge()
    assert torch.equal(logits(model), expected)


# ----------------------------------------------------------------------------------------------- several adapters


@every_case
def test_adapters_live_beside_each_other(name):
    model = prompted(name)
    first = logits(model)
    model.add_adapter("second", config(name))
    base = model.get_base_model()
    assert len(base._forward_hooks) == len(base._forward_pre_hooks) == 1
    assert torch.equal(logits(model), first) and not any(
        parameter.requires_grad for key, parameter in model.named_parameters() if ".second." in key
    )
    model.set_adapter("second")
    model.begin_task(["cat", "dog"])
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.config.label2id == {"cat": 0, "dog": 1}
    assert logits(model).shape == (4, 2)
    step(model)
    assert all((value is None) == (".default." in key) for key, value in gradients(model).items())
    model.eval().set_adapter("default")
    assert model.config.num_labels == 6 and torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="one prompt adapter can be active at a time.*Name one"):
        model.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits(model), first)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.config.num_labels == 2 and not any(".default." in key for key in model.state_dict())
    model.delete_adapter("second")
    assert base.config.num_labels == 12 and torch.equal(logits(base), logits(tiny()))
    with pytest.raises(ValueError, match=r"No adapter is active.*set_adapter\(name\)"):
        model.begin_task(["cat"])


def test_one_configuration_serves_several_models():
    shared = config("coda")
    first, second = get_peft_model(tiny(), shared), get_peft_model(tiny(), shared)
    first.begin_task(["a", "b"])
    assert shared.classes is None and second.peft_config["default"].num_tasks == 0
    second.add_adapter("other", shared)
    second.set_adapter("other")
    second.begin_task(["c"])
    assert second.peft_config["default"].num_tasks == 0 and first.peft_config["default"].classes == ["a", "b"]


def test_another_method_on_the_same_model_is_refused():
    model = prompted("l2p")
    before = logits(model)
    with pytest.raises(ValueError, match="carries an adapter of another method.*CODA-Prompt beside it.*unload"):
        get_peft_model(model.get_base_model(), config("coda"))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_a_head_without_a_classifier_to_follow_goes_where_the_model_is():
    base = tiny(num_labels=0).to("meta")
    model = get_peft_model(base, config("coda"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_threads_do_not_see_each_others_prompts():
    """A server's threads may call one model; the calls wait for each other and answer as if alone."""
    model = prompted("coda")
    batches = [images(seed=seed) for seed in range(6)]
    expected = [logits(model, batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within a call, as they may on a busy machine
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda index: logits(model, batches[index % 6]), range(60)))
    finally:
        sys.setswitchinterval(interval)
    for index, answer in enumerate(answers):
        torch.testing.assert_close(answer, expected[index % 6], rtol=0, atol=0)


def test_threads_may_ask_for_queries_and_call_the_encoder():
    """Of a half-precision backbone on a CPU, whose attention modules are lent something in each call."""
    model = prompted("coda")
    model.base_model.encoder.base_layer.bfloat16()
    model.eval()
    encoder = model.base_model.encoder
    calls = [encoder.query, lambda batch: encoder(batch).last_hidden_state, model.base_model.query]
    calls.append(lambda batch: model(batch).logits)
    batch = images().bfloat16()
    with torch.no_grad():
        expected = [call(batch) for call in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    @torch.no_grad()
    def work(index):
        return calls[index % 4](batch)

    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(work, range(80)))
    finally:
        sys.setswitchinterval(interval)
    for index, answer in enumerate(answers):
        torch.testing.assert_close(answer, expected[index % 4], rtol=0, atol=0)
    assert {type(layer.attention.config).__name__ for layer in encoder.base_layer.layers} == {"ViTConfig"}


def test_a_wrapped_model_is_not_wrapped_again():
    model = prompted("coda")
    with pytest.raises(ValueError, match="is a PeftModel, which carries an adapter already.*unload"):
        get_peft_model(model, model.peft_config["default"])
    with pytest.raises(NotImplementedError, match="Keep them side by side"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_call_that_failed_or_was_cut_off_holds_nobody_up():
    model = prompted("coda")
    expected = logits(model)
    with pytest.raises(ValueError):
        model(images(), task_ids=torch.tensor([7, 7, 7, 7]))
    model.base_model.encoder.base_layer.embeddings.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(images())
    model.base_model.encoder.base_layer.embeddings._forward_hooks.clear()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(logits, model).result(timeout=60), expected, rtol=0, atol=0)


def interrupt(module, inputs, output):
    raise KeyboardInterrupt
