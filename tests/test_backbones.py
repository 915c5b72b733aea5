"""Every family of backbones: what is refused, and that all else works as PEFT and transformers promise it."""

from __future__ import annotations

import copy

import pytest
import torch
from backbone_cases import FAMILIES, MAKERS, tiny_backbone
from backbone_table import PAGE, page
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, IJepaConfig, IJepaForImageClassification
from tuner_cases import CASES, METHODS, adapter_parameters, begin, config, images, labels, logits, step

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig
from peft_cl.backbones import FAMILIES as KNOWN
from peft_cl.backbones import Family, family_of, register_family
from peft_cl.heads import HEADS
from peft_cl.tuners.base.encoder import NO_PROMPTS


#: Presets whose prompts enter as tokens, and the reason that a family gives against them.
TOKENS = ("l2p", "l2p-textbook", "dualprompt-textbook", "dualprompt-key", "coda-textbook", "coda-shared")
NO_TOKENS = {"beit": "relative positions", "beit-shared": "relative positions", "swin": "windows", "swinv2": "windows"}


def why_refused(name: str, case: str) -> str | None:
    """The words of the reason for which this combination is refused, or None."""
    if case in TOKENS and name in NO_TOKENS:
        return f"prompt_type is 'tokens', but .*{NO_TOKENS[name]}.*prompt_type='prefix'"
    if case in ("coda-textbook", "coda-shared") and name.startswith("siglip"):
        return "query_source is 'layer_cls', but the base model has no CLS token"
    if case == "coda-layer-mean" and name.startswith("swin"):
        return r"layers are of the widths \[12, 24\]"
    return None


def combinations(cases) -> list:
    return [(name, case) for name in MAKERS for case in cases]


def adapted(name: str, case: str, tasks: int = 2, **overrides) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_backbone(name, **overrides), config(case))
        for task in range(tasks):
            begin(model, task)
    return model.eval()


def loss_and_gradients(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # DINOv3 draws positions in training
    loss = model(pixel_values=images(), labels=labels(model)).loss
    loss.backward()
    found = {key: value.grad.clone() for key, value in adapter_parameters(model).items() if value.grad is not None}
    model.eval()
    return loss.detach(), found


def check(name: str, case: str, tmp_path) -> None:
    base = tiny_backbone(name)
    if reason := why_refused(name, case):
        with pytest.raises(ValueError, match=reason):
            get_peft_model(base, config(case))
        return
    plain = logits(base)
    model = adapted(name, case)
    answers = logits(model)
    assert answers.shape == (4, 6) and answers.isfinite().all()
    # The base model is whole inside.
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    # Prompts and head get gradients, the same with and without checkpointing, and nothing else does.
    loss, gradients = loss_and_gradients(model)
    assert gradients and not any(value.isnan().any() for value in gradients.values())
    learnt = {id(value) for value in adapter_parameters(model).values()}
    assert all(value.grad is None for value in model.parameters() if id(value) not in learnt)
    again = copy.deepcopy(model)
    again.get_base_model().gradient_checkpointing_enable()
    checkpointed, found = loss_and_gradients(again)
    torch.testing.assert_close(checkpointed, loss)
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)
    # Each image of a batch is answered as alone.
    torch.testing.assert_close(logits(model, images()[1:2]), answers[1:2], rtol=1e-4, atol=1e-4)
    # Saved and loaded, by PEFT, beside another adapter.
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_backbone(name), tmp_path)
    torch.testing.assert_close(logits(loaded), answers, rtol=0, atol=1e-6)
    loaded.add_adapter("other", config(case))
    loaded.set_adapter("other")
    if case == "linear-probe":
        torch.testing.assert_close(logits(loaded), plain, rtol=1e-5, atol=1e-5)
    loaded.set_adapter("default")
    torch.testing.assert_close(logits(loaded), answers, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(loaded.unload()), plain, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "case"), [pair for pair in combinations(METHODS) if pair[0] in FAMILIES])
def test_the_methods(name, case, tmp_path):
    check(name, case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"), [pair for pair in combinations(CASES) if pair[1] not in METHODS or pair[0] not in FAMILIES]
)
def test_all_forms(name, case, tmp_path):
    check(name, case, tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_without_prompts_it_is_the_base_model_to_the_bit(name):
    base = tiny_backbone(name)
    expected = logits(base)
    model = get_peft_model(base, LinearProbeConfig()).eval()
    assert torch.equal(logits(model), expected)
    # The passes alone, layer by layer, against the encoder's own forward.
    encoder = model.base_model.encoder
    family = encoder.family
    with torch.no_grad():
        own = encoder.base_layer(images()).last_hidden_state
        hidden, kept = encoder._finish(encoder._start(images(), False, 0, _trace()), 0, NO_PROMPTS, "all", _trace())
        assert kept == 0 and torch.equal(family.last_hidden_state(encoder.base_layer, hidden), own)


def _trace():
    from peft_cl.tuners.base.call import Trace

    return Trace()


@pytest.mark.parametrize("name", MAKERS)
def test_eager_and_sdpa_agree(name):
    models = [adapted(name, "dualprompt"), adapted(name, "dualprompt")]
    models[1].get_base_model().set_attn_implementation("eager")
    torch.testing.assert_close(*map(logits, models), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*map(loss_and_gradients, models), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bfloat16_backbone(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_backbone(name).bfloat16(), config("dualprompt"))
        begin(model, 0)
    _, gradients = loss_and_gradients(model)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in gradients.values())
    exact = adapted(name, "dualprompt", tasks=1)
    torch.testing.assert_close(logits(model).float(), logits(exact), rtol=0.3, atol=0.5)


@pytest.mark.parametrize(("name", "case"), [pair for pair in combinations(["coda", "l2p"]) if not why_refused(*pair)])
def test_gradients_are_those_of_finite_differences(name, case):
    model = adapted(name, case).double()
    pictures, weights = images(2).double(), images(2).double().flatten()[:12].view(2, 6)
    chosen = {
        key: value for key, value in adapter_parameters(model).items() if value.requires_grad and "prompts" in key
    }

    def number() -> torch.Tensor:
        return (model(pictures).logits * weights).sum()

    number().backward()
    generator = torch.Generator().manual_seed(0)
    for value in chosen.values():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        step, start = 1e-5, value.detach().clone()
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                value.copy_(start + sign * step * direction)
                ends.append(number())
            value.copy_(start)
        expected = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((value.grad * direction).sum(), expected, rtol=1e-5, atol=1e-8)
    assert chosen


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("config_class", [LinearProbeConfig, L2PConfig, DualPromptConfig, CodaPromptConfig])
def test_the_best_preset(name, config_class, tmp_path):
    """Heads that observe, over all features that the family has; with prompts cut to the depth of a tiny model."""
    layers = {} if config_class is LinearProbeConfig else {"layers": "all"}
    if config_class is DualPromptConfig:
        layers["g_layers"] = [0.0]
    model = get_peft_model(tiny_backbone(name), config_class.from_preset("best", **layers))
    pictures, classes = images(30), torch.arange(30) % 3
    for task in range(2):
        model.begin_task([f"{task} {row}" for row in range(3)])
        model.base_model.observe(pictures + task, classes + 3 * task)
        model.base_model.fit_head()
    answers = logits(model.eval(), pictures)
    assert answers.shape == (30, 6) and answers.isfinite().all()
    # It knows what it has seen: each image is nearest to its own class.
    assert (logits(model, pictures + 1).argmax(-1) == classes + 3).float().mean() > 0.6
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_backbone(name), tmp_path), pictures), answers, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("head", [head for head in HEADS if head != "text"])  # that is in test_text_head.py
@pytest.mark.parametrize("features", [None, "mean"])
@pytest.mark.parametrize("case", ["coda", "linear-probe"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_head(name, case, features, head, tmp_path):
    if head == "fusion" and case == "linear-probe":
        with pytest.raises(ValueError, match="head is 'fusion', which reads the frozen model's features beside"):
            config(case, head=head)
        return
    model = get_peft_model(tiny_backbone(name), config(case, head=head, head_features=features))
    torch.manual_seed(0)
    for task in range(2):
        begin(model, task)
        if any(value.requires_grad for value in model.parameters()):  # a linear head, prompts under a computed one
            step(model)
        model.base_model.fit_head([{"pixel_values": images(9, task), "labels": torch.arange(9) % 3 + 3 * task}])
    answers = logits(model.eval())
    assert answers.shape == (4, 6) and answers.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_backbone(name), tmp_path)
    torch.testing.assert_close(logits(loaded), answers, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"), [pair for pair in combinations(["l2p", "dualprompt"]) if not why_refused(*pair)]
)
def test_compiled_layers(name, case):
    plain, compiled = adapted(name, case), adapted(name, case)
    torch._dynamo.reset()
    compiled.base_model.encoder.compile_layers(backend="eager")
    torch.testing.assert_close(logits(compiled), logits(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*map(loss_and_gradients, (compiled, plain)), rtol=1e-3, atol=1e-4)


def test_the_page_of_backbones_says_what_the_code_does():
    assert PAGE.read_text() == page(PAGE.read_text())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dinov3_vit"])
def test_the_auto_class_loads_what_is_known(name, tmp_path):
    tiny_backbone(name).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert family_of(model).model_type == name
    torch.testing.assert_close(logits(model), logits(tiny_backbone(name)), rtol=0, atol=0)


def test_every_family_is_tried():
    assert set(FAMILIES) | {"vit_mae", "siglip2", "timm_wrapper"} == set(KNOWN)


def test_a_family_of_the_users_own(monkeypatch):
    monkeypatch.setattr("peft_cl.backbones.families.FAMILIES", dict(KNOWN))
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = IJepaForImageClassification(IJepaConfig(**sizes, intermediate_size=48, num_labels=3)).eval()
    with pytest.raises(ValueError, match=r"IJepaAttention\) is of a form that is not described.*register_family"):
        get_peft_model(base, L2PConfig())
    register_family(Family("ijepa", ("IJepaForImageClassification",), encoder="ijepa", special_tokens=0, reads="mean"))
    with pytest.raises(ValueError, match="A family of model_type 'ijepa' is known already"):
        register_family(Family("ijepa", ("Other",), encoder="ijepa"))
    expected = logits(base)
    model = get_peft_model(base, LinearProbeConfig()).eval()
    assert torch.equal(logits(model), expected)
    model = get_peft_model(model.unload(), DualPromptConfig(layers=[1], g_layers=[0])).eval()
    model.begin_task(["a", "b"])
    assert logits(model).shape == (4, 2)
