"""What the two passes share or leave out: the same numbers as without, and really left out."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from tuner_cases import CASES, FAMILIES, gradients, images, labels, logits, prompted, step, tiny

from peft_cl.tuners.base.encoder import PromptedEncoder


every_case = pytest.mark.parametrize("name", CASES)
#: Cases whose prompts may begin above the first layer.
LATE = {"l2p++": [1, 2], "coda": [1, 2], "dualprompt": [2], "dualprompt-coda": [2]}


def late(name: str, *arguments, **overrides):
    """The case, with prompts from layer 1 on."""
    more = {"g_layers": [1]} if name.startswith("dualprompt") else {}
    return prompted(name, *arguments, layers=LATE[name], **more, **overrides)


@pytest.fixture
def plain(monkeypatch):
    """`plain(model)`: the model as it would be without sharing and leaving out."""

    def call(model):
        encoder = model.base_model.encoder
        encoder.reads_last_layer = False
        monkeypatch.setattr(encoder, "_is_fixed", lambda *arguments: False)
        return model

    return call


def assert_same(model, reference, dtype=torch.float32) -> None:
    """Logits, loss terms and gradients agree."""
    size = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    tolerance = {"rtol": size, "atol": size}
    torch.testing.assert_close(logits(model), logits(reference), **tolerance)
    torch.testing.assert_close(step(model), step(reference), **tolerance)
    expected = gradients(reference)
    assert any(value is not None for value in expected.values())
    for name, gradient in gradients(model).items():
        if gradient is None or expected[name] is None:
            assert gradient is expected[name], name
            continue
        scale = expected[name].abs().max().clamp_min(0.1)
        torch.testing.assert_close(gradient / scale, expected[name] / scale, **tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@every_case
def test_the_numbers_are_those_of_two_whole_passes(name, family, attention, plain):
    settings = {"attn_implementation": attention}
    assert_same(prompted(name, tiny(family, **settings)), plain(prompted(name, tiny(family, **settings))))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LATE)
def test_layers_below_the_first_prompt_are_shared(name, family, attention, plain):
    model = late(name, tiny(family, attn_implementation=attention))
    assert_same(model, plain(late(name, tiny(family, attn_implementation=attention))))
    calls = []
    for part in (model.base_model.encoder.base_layer.embeddings, model.base_model.encoder.base_layer.layers[0]):
        part.register_forward_hook(lambda module, inputs, output: calls.append(type(module).__name__))
    logits(model)
    assert len(calls) == 2 and calls[0].endswith("Embeddings")  # once each, for both passes
    calls.clear()
    step(model)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@every_case
def test_a_backbone_in_half_precision(name, family, dtype, plain):
    models = [prompted(name, tiny(family).to(dtype)) for _ in range(2)]
    assert_same(models[0], plain(models[1]), dtype)


@pytest.mark.parametrize("family", FAMILIES)
@every_case
def test_a_cached_query_gives_the_same_logits_and_gradients(name, family):
    model, reference = prompted(name, family), prompted(name, family)
    query = model.query(images())
    torch.testing.assert_close(logits(model, query=query), logits(reference), rtol=1e-5, atol=1e-5)
    step(reference)
    model.train()
    model(pixel_values=images(), labels=labels(model), query=query).loss.backward()
    for part, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[part], gradient, rtol=1e-5, atol=1e-5, msg=part)


@pytest.mark.parametrize("name", LATE)
def test_the_graph_begins_at_the_first_prompt(name):
    model = late(name).train()
    seen = {}
    for index, layer in enumerate(model.base_model.encoder.base_layer.layers):
        layer.register_forward_pre_hook(
            lambda module, inputs, index=index: seen.update({index: inputs[0].requires_grad})
        )
    model(images(), labels=labels(model))
    first = model.base_model.pool.first_layer
    assert first > 0 and not any(needs for index, needs in seen.items() if index < first)
    assert seen[2] and set(seen) == {0, 1, 2}


@pytest.mark.parametrize("name", ["coda", "dualprompt"])
def test_no_product_is_done_for_tokens_that_nobody_reads(name, plain):
    """Floating point operations, counted: the last of 3 layers does its products for one of 5 tokens."""

    def operations(model, query=None):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(), query=query)
        return counter.get_total_flops()

    eager = {"attn_implementation": "eager"}  # whose products are counted
    model, reference = prompted(name, tiny(**eager)), plain(prompted(name, tiny(**eager)))
    query = model.query(images())
    size, inner, batch, tokens = 24, 48, 4, 5
    # Per token left out: queries, output projection, the two halves of the MLP; scores and mixing beside them.
    left_out = 2 * batch * (tokens - 1) * (2 * size * size + 2 * size * inner)
    attention = operations(reference, query) - operations(model, query) - left_out
    assert 0 < attention < 0.2 * left_out
    embedding = 2 * batch * 4 * 3 * 64 * size
    saved = operations(reference) - operations(model)
    unprompted = 2 * batch * (tokens - 1) * 2 * tokens * size  # scores and mixing in the query pass
    assert saved == 2 * left_out + embedding + attention + unprompted


def test_dropout_below_the_first_prompt_is_drawn_for_the_prompted_pass(plain):
    """The query pass is in evaluation mode, so with dropout the hidden states are not the same."""
    base = tiny(hidden_dropout_prob=0.5)
    model = late("coda", base).train()
    encoder: PromptedEncoder = model.base_model.encoder
    assert not encoder._is_fixed(images(), 1)
    assert encoder.eval()._is_fixed(images(), 1)
    assert late("coda", tiny(attention_probs_dropout_prob=0.1)).train().base_model.encoder._is_fixed(images(), 0)
    assert not late("coda", tiny(attention_probs_dropout_prob=0.1)).train().base_model.encoder._is_fixed(images(), 1)


def test_gradients_reach_images_and_an_unfrozen_backbone(plain):
    for unfrozen in (False, True):
        models = [late("coda"), plain(late("coda"))]
        found = []
        for model in models:
            model.base_model.encoder.base_layer.requires_grad_(unfrozen)
            pixels = images().requires_grad_(not unfrozen)
            model(pixels, labels=labels(model)).loss.backward()
            weights = [value.grad for value in model.base_model.encoder.base_layer.layers[0].parameters()]
            found.append(weights if unfrozen else [pixels.grad])
        torch.testing.assert_close(found[0], found[1])


def test_hooks_on_the_last_layer_see_all_tokens():
    """As Grad-CAM and feature extraction use them."""
    model, shapes = prompted("coda"), []
    layer = model.base_model.encoder.base_layer.layers[-1]
    expected = logits(model)
    layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    torch.testing.assert_close(logits(model), expected)
    assert shapes == [(4, 5, 24)] * 2
    assert model.base_model.encoder(images()).last_hidden_state.shape == (4, 5, 24)  # asked for by itself


@pytest.mark.parametrize("place", ["norm", "encoder"])
def test_hooks_behind_the_last_layer_see_all_tokens(place):
    model, shapes = prompted("coda"), []
    encoder = model.base_model.encoder
    module = encoder if place == "encoder" else encoder.base_layer.layernorm
    module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output[0].shape)))
    logits(model)
    assert set(shapes) == ({(4, 5, 24)} if place == "encoder" else {(5, 24)})


def test_backward_hooks_on_the_last_layer_see_all_tokens():
    model, shapes = prompted("coda"), []
    for module in (model.base_model.encoder.base_layer.layers[-1], model.base_model.encoder.base_layer.layers[-1].mlp):
        module.register_full_backward_hook(lambda module, before, after: shapes.append(tuple(after[0].shape)))
    step(model)
    assert shapes == [(4, 5, 24)] * 2


class Squared(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.attention = layer.attention

    def forward(self, hidden):
        return self.layer(hidden).square()


class Squaring(ModelHook):
    def post_forward(self, module, output):
        return output.square()


@pytest.mark.parametrize("how", ["replaced", "accelerate"])
def test_a_last_layer_that_was_changed_is_run_as_it_is_now(how, plain):
    models = [prompted("coda"), plain(prompted("coda"))]
    before = logits(models[0])
    for model in models:
        layers = model.base_model.encoder.base_layer.layers
        if how == "replaced":
            layers[-1] = Squared(layers[-1])
        else:
            add_hook_to_module(layers[-1], Squaring())
    torch.testing.assert_close(logits(models[0]), logits(models[1]))
    assert (logits(models[0]) - before).abs().max() > 1e-3


def test_hidden_states_asked_for_once_cost_nothing_later():
    """transformers leaves hooks on the layers for good."""

    def operations():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images())
        return counter.get_total_flops()

    model = prompted("coda")
    before = operations()
    with model.disable_adapter():
        assert len(model(images(), output_hidden_states=True).hidden_states) == 4
    assert operations() == before


@every_case
def test_prefixes_go_through_the_fused_attention_kernel(name):
    """Forward and backward: sdpa falls back to separate products, and keeps their (N, N) weights, without a word."""
    model = prompted(name, tiny(attn_implementation="sdpa"))
    with torch.profiler.profile() as profile:
        step(model)
    calls = {event.key: event.count for event in profile.key_averages()}
    attended = calls["aten::scaled_dot_product_attention"]
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == attended > 0
    assert "aten::_scaled_dot_product_attention_math" not in calls
    learns_below = name != "linear-probe"
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu_backward" in calls) == learns_below


def test_a_layer_of_another_make_is_run_whole(monkeypatch):
    from transformers.models.vit.modeling_vit import ViTLayer

    own = ViTLayer.forward
    monkeypatch.setattr(
        ViTLayer, "forward", lambda self, hidden, *args, **more: own(self, hidden, *args, **more) * 1.5
    )
    model = prompted("coda")
    assert not model.base_model.encoder.reads_last_layer
    torch.testing.assert_close(model.query(images()), tiny().vit(images()).last_hidden_state[:, 0])


def test_the_frozen_layers_can_be_compiled():
    """One by one and without a break in the graph, so that prompts which change do not compile them anew."""
    torch._dynamo.reset()
    model = prompted("coda")
    model.base_model.encoder.compile_layers(backend="aot_eager", fullgraph=True)
    assert_same(model, prompted("coda"))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for parameter in model.base_model.pool.parameters():
        parameter.data.add_(0.1)
    step(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0


def test_an_attention_function_sees_its_own_name_beside_a_prefix():
    """flash attention looks up what to load by the name in the module's config."""
    seen = []

    def attend(module, *arguments, **more):
        seen.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *arguments, **more)

    AttentionInterface.register("spy", attend)
    model = prompted("coda", tiny(attn_implementation="spy"))
    torch.testing.assert_close(logits(model), logits(prompted("coda")))
    assert seen == ["spy"] * 6
