"""What PEFT promises of an adapter, kept by every method and form on every family."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import get_layer_status, get_model_status, get_peft_model
from tuner_cases import (
    CASES,
    FAMILIES,
    METHODS,
    adapter_parameters,
    begin,
    config,
    gradients,
    images,
    labels,
    logits,
    prompted,
    step,
    tiny,
)


every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("name", METHODS)


def same_gradients(first, second, **tolerance) -> None:
    for name, gradient in first.items():
        assert (gradient is None) == (second[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                gradient, second[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def count_calls(module) -> list:
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


# ----------------------------------------------------------------------------------------------- the base model


@every_family
@every_case
def test_a_disabled_adapter_is_the_base_model(name, family):
    base, model = tiny(family), prompted(name, family)
    expected = base(images(), labels=torch.arange(4))
    before = logits(model)
    with model.disable_adapter():
        assert model.config.id2label == base.config.id2label
        output = model(images(), labels=torch.arange(4))
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert list(model.config.id2label.values()) == [f"class {i}" for i in range(6)]
    assert model.get_base_model().num_labels == model.config.num_labels == before.shape[1] == 6
    assert torch.equal(logits(model), before)


@every_family
@every_case
def test_only_pool_and_head_learn(name, family):
    model = prompted(name, family)
    step(model)
    mine = adapter_parameters(model)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter_name in mine), parameter_name
        assert (parameter.grad is not None) == (parameter_name in mine), parameter_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # at width 24, with 6 classes: head 6 * 24 + 6
        ("l2p", 6 * 3 * 24 + 6 * 24 + 150),
        ("l2p-deep", 3 * 6 * 4 * 24 + 3 * 6 * 24 + 150),
        ("dualprompt", 2 * 5 * 24 + 2 * 2 * 3 * 24 + 24 + 150),
        ("dualprompt-textbook", 5 * 24 + 3 * 24 + 24 + 2 * (24 * 24 + 24) + 150),
        ("coda", 2 * 2 * (4 * 24 + 24 + 24) + 150),
        ("linear-probe", 150),
    ],
)
def test_trainable_parameters_are_counted(name, expected, capsys):
    model = prompted(name)
    assert model.get_nb_trainable_parameters()[0] == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} ||" in capsys.readouterr().out


@every_method
def test_peft_reports_the_status(name):
    model = prompted(name)
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"], ["default"])
    assert status.peft_types == {"default": model.peft_config["default"].peft_type.value}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert {layer.module_type for layer in get_layer_status(model)} == {"PromptedEncoder", "ClassifierHead"}


@every_method
def test_the_base_model_answers_like_the_peft_model(name):
    """PEFT calls the base model and never the tuner's forward, so all behaviour must sit on the base model."""
    model = prompted(name).train()
    torch.testing.assert_close(
        model.get_base_model()(images(), labels=labels(model)).loss, model(images(), labels=labels(model)).loss
    )


@pytest.mark.parametrize("training", [True, False])
@every_method
def test_an_adapter_takes_the_mode_of_its_base_model(name, training):
    model = get_peft_model(tiny().train(training), config(name))
    assert {module.training for module in model.get_base_model().modules()} == {training}
    model.train(not training).add_adapter("second", config(name))
    assert {module.training for module in model.modules()} == {not training}


@every_case
def test_a_probe_before_its_first_task_answers_like_the_base_model(name):
    model = get_peft_model(tiny(), config(name))
    assert model.config.id2label == tiny().config.id2label
    assert logits(model).shape == (4, 12)
    if name == "linear-probe":
        torch.testing.assert_close(logits(model), logits(tiny()))  # not to the bit: the last layer is read in part


# ----------------------------------------------------------------------------------------------- attention, memory


@every_family
@every_case
def test_eager_and_sdpa_agree(name, family):
    eager = tiny(family, attn_implementation="eager")
    model, other = prompted(name, family), prompted(name, eager)
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-5)
    model.get_base_model().set_attn_implementation("eager")
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_case
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    plain, model = prompted(name), prompted(name)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = [count_calls(other.get_base_model().vit.base_layer.layers[2].mlp) for other in (plain, model)]
    assert torch.equal(step(plain), step(model))
    same_gradients(gradients(plain), gradients(model))
    recomputed = 0 if name == "linear-probe" else 1 + 2 * (name == "dualprompt-textbook")  # G and E alone, too
    assert len(calls[1]) == len(calls[0]) + recomputed
    for other in (plain, model):  # two forwards, then two backwards: the recomputation must see its own prefix
        other.zero_grad()
        losses = [other(images(seed=seed), labels=labels(other)).loss for seed in (1, 2)]
        other.get_base_model().activation_checkpointing_disable()
        for loss in losses:
            loss.backward()
        assert not any(layer.gradient_checkpointing for layer in other.get_base_model().vit.base_layer.layers)
    same_gradients(gradients(plain), gradients(model))


@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
def test_a_checkpointed_base_can_be_wrapped():
    base = tiny()
    base.activation_checkpointing_enable({"use_reentrant": True})
    model = prompted("dualprompt", base)
    assert torch.equal(step(prompted("dualprompt")), step(model))


@every_family
@every_case
def test_a_bfloat16_base_keeps_float32_prompts(name, family):
    model = prompted(name, tiny(family).bfloat16())
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}
    assert model.get_base_model().get_input_embeddings().projection.weight.dtype == torch.bfloat16
    assert torch.isfinite(step(model)) and logits(model.eval()).dtype == torch.float32
    same_choice = {"query": tiny(family).get_submodule(family)(images()).last_hidden_state[:, 0].detach()}
    torch.testing.assert_close(
        logits(model, **same_choice), logits(prompted(name, family), **same_choice), atol=0.3, rtol=0.1
    )


@every_case
def test_the_whole_model_can_be_cast_or_autocast(name):
    model = prompted(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(step(model))
    assert torch.isfinite(logits(model.eval().bfloat16(), images().bfloat16())).all()
    assert torch.isfinite(step(model))


# ----------------------------------------------------------------------------------------------- copies


def pickled(model):
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    return pickle.load(file)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@every_case
def test_copies_are_equal_and_independent(name, duplicate):
    model = prompted(name)
    expected = logits(model)
    twin = duplicate(model)
    assert torch.equal(logits(twin), expected)
    begin(twin, 2)
    assert logits(twin).shape[1] == 9 and twin.config.num_labels == 9
    assert torch.equal(logits(model), expected) and model.config.num_labels == 6
    base = twin.unload()
    assert torch.equal(logits(base), logits(tiny()))
    assert torch.equal(logits(model), expected)


# ----------------------------------------------------------------------------------------------- what a call returns


def test_hidden_states_and_attentions_are_returned():
    base = tiny(attn_implementation="eager")
    expected = base(images(), output_hidden_states=True, output_attentions=True)
    output = prompted("linear-probe", tiny(attn_implementation="eager"))(
        images(), output_hidden_states=True, output_attentions=True
    )
    for ours, theirs in ((output.hidden_states, expected.hidden_states), (output.attentions, expected.attentions)):
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    output = prompted("l2p", base)(images(), output_hidden_states=True)
    assert [states.shape[1] for states in output.hidden_states] == [2 * 3 + 5] * 4
    assert output.attentions is None
    base = tiny(attn_implementation="eager")
    base.config.output_attentions = True
    attentions = prompted("dualprompt", base)(images()).attentions
    assert [weights.shape for weights in attentions] == [(4, 2, 5, 5 + length) for length in (5, 3, 3)]
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(4, 2, 5))


@every_method
def test_attention_maps_whatever_the_attention(name):
    """Kernels that never hold the weights leave none to show: those of the eager attention are shown."""
    images_ = images()
    expected = prompted(name, tiny(attn_implementation="eager"))(images_, output_attentions=True)
    model = prompted(name, tiny(attn_implementation="sdpa"))
    output = model(images_, output_attentions=True)
    assert output.attentions and len(output.attentions) == len(expected.attentions)
    for ours, theirs in zip(output.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.config._attn_implementation == "sdpa"


@every_family
@every_method
def test_tuples_and_positional_labels(name, family):
    model = prompted(name, family).train()
    expected = model(pixel_values=images(), labels=labels(model))
    assert list(expected)[:2] == ["loss", "logits"]
    loss, scores = model(images(), labels(model), return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(scores, expected.logits)
    (scores,) = model(images(), return_dict=False)
    assert torch.equal(scores, expected.logits)
    assert "loss" not in model(images())


@every_family
def test_larger_images_with_interpolated_positions(family):
    larger = images(size=24)
    expected = logits(tiny(family), larger, interpolate_pos_encoding=True)
    probe = get_peft_model(tiny(family), config("linear-probe"))
    torch.testing.assert_close(logits(probe, larger, interpolate_pos_encoding=True), expected)
    assert logits(prompted("l2p", family), larger, interpolate_pos_encoding=True).shape == (4, 6)


def test_an_attention_mask_is_refused():
    with pytest.raises(ValueError, match="attention_mask is not supported with prompts.*disable_adapter"):
        prompted("l2p")(images(), attention_mask=torch.ones(4, 5))


# ----------------------------------------------------------------------------------------------- the query pass


@every_case
def test_a_given_query_replaces_the_query_pass(name):
    model = prompted(name)
    expected = logits(model)
    query = model.query(images())
    torch.testing.assert_close(query, tiny().vit(images()).last_hidden_state[:, 0])
    assert torch.equal(logits(model, query=query), expected)


@every_case
def test_the_query_pass_is_in_evaluation_mode(name):
    """Dropout must not move the query, and every module must get its own mode back."""
    base = tiny(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = prompted(name, base).train()
    base.vit.base_layer.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.query(images()), model.query(images()))
    assert not torch.equal(model(images()).logits, model(images()).logits)
    assert [module.training for module in model.modules()] == modes
    assert not model.query(images()).requires_grad


# ----------------------------------------------------------------------------------------------- faults inside a call


def state(model) -> list:
    base = model.get_base_model()
    layers = base.vit.base_layer.layers
    return [
        *(type(layer.attention.config) for layer in layers),
        *(layer.gradient_checkpointing for layer in layers),
        *(len(layer.attention._forward_hooks) for layer in layers),
        *(module.training for module in model.modules()),
        base.vit.call,
    ]


@every_case
def test_a_fault_inside_a_call_leaves_no_trace(name):
    model = prompted(name)
    expected, before = logits(model), state(model)
    mlp = model.get_base_model().vit.base_layer.layers[2].mlp

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(images(), task_ids=[0] * 4, output_attentions=True)
    hook.remove()
    with pytest.raises(ValueError, match="labels reach from 0 to 6, but the active head knows the classes 0 to 5"):
        model(images(), labels=torch.tensor([0, 1, 2, 6]))
    with pytest.raises(ValueError, match="24"):
        model(images(size=24))
    assert state(model) == before
    assert torch.equal(logits(model), expected)


@every_case
def test_the_base_configuration_stays_clean(name, tmp_path):
    base = tiny()
    base.save_pretrained(tmp_path / "before")
    model = prompted(name, base)
    step(model)
    with model.disable_adapter():
        assert model.config.to_json_string() == (tmp_path / "before" / "config.json").read_text()
    assert "peft_cl" not in model.config.to_json_string()
    model.unload().save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
