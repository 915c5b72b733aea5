"""PEFT's own methods on the task sequence: what LoRA and OSF learn, and when; backbones, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import test_told_before_training as told
import torch
from backbone_cases import FAMILIES, tiny_backbone
from peft import LoraConfig, OSFConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.osf import OSFLayer
from peft_cases import ALL, LDA, LORA, PIXELS, backbone_of, config_of, logits, made
from trainer_cases import CONFIGS, images
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
)

from peft_cl import LinearProbeConfig, Strategy, task_free
from peft_cl.strategies import EWC, FineTuning
from peft_cl.strategies.lora import FirstSessionLoRA, SequentialLoRA
from peft_cl.strategies.osf import OSF, preserved_rank
from peft_cl.tuners.base.merged import layers_of_others, merged, parameters_of_others


class Watch(Strategy):
    """Notes the batch of the first step, and the weights after each task."""

    def __init__(self, steps=0):
        self.batches, self.weights, self.ranks = [], [], []

    def begin_task(self, trainer, task):
        layers = layers_of_others(backbone_of(trainer.model))
        self.ranks.append(
            {layer.effective_rank["default"] for layer in layers.values() if isinstance(layer, OSFLayer)}
        )

    def batch(self, trainer, inputs):
        self.batches.append({name: value.clone() for name, value in inputs.items()})
        return inputs

    def end_task(self, trainer, task):
        self.weights.append({name: value.clone() for name, value in backbone_of(trainer.model).state_dict().items()})


# ------------------------------------------------------------------------------------------------ as PEFT alone


def one_step_of_peft(
    reference: ViTForImageClassification, config, batch, rate: float, initial=None
) -> torch.nn.Module:
    """The backbone after one step of gradient descent by PEFT alone, merged; `initial` are LoRA's first weights."""
    classes = 2
    head = torch.nn.Linear(48, classes)
    model = get_peft_model(reference.vit, config)
    model.load_state_dict(initial or {}, strict=False)
    head.load_state_dict(batch["head"])
    logits = head(model(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0])
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return model.merge_and_unload()


@pytest.mark.parametrize("name", ["sequential", "osf"])
def test_a_step_is_that_of_peft_alone(name, tiny_vit, make_trainer):
    """Same weights, same batch, gradient descent: PEFT's layers on the bare encoder, with a plain linear head."""
    start = {}

    class Start(Strategy):
        def begin_task(self, trainer, task):
            start["head"] = copy.deepcopy(trainer.tuner.head.active.state_dict())
            start["backbone"] = copy.deepcopy(backbone_of(trainer.model).state_dict())

    watch, rate = Watch(), 0.05
    optimizer = {"optim": "sgd", "learning_rate": rate, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = made(make_trainer, name, watch, Start(), max_steps=1, num_tasks=3, **optimizer)
    trainer.train_task(trainer.scenario[0])
    batch = {**watch.batches[0], "head": {part: start["head"][part] for part in ("weight", "bias")}}
    if name == "osf":
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
        found = one_step_of_peft(tiny_vit(), OSFConfig(target_modules=linear, effective_rank=0.5), batch, rate)
    else:
        initial = {f"base_model.model.{part}": value for part, value in start["backbone"].items() if "lora_" in part}
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        found = one_step_of_peft(tiny_vit(), config, batch, rate, initial)
    ours, before = merged(backbone_of(trainer.model)).state_dict(), tiny_vit().vit.state_dict()
    moved = [part for part, value in ours.items() if not torch.equal(value, before[part])]
    assert len(moved) == (6 * 6 if name == "osf" else 2 * 6)
    for part, value in found.state_dict().items():
        torch.testing.assert_close(ours[part], value, rtol=0, atol=2e-7)


def test_lora_is_the_low_rank_update_of_its_paper(make_trainer):
    """Hu et al. 2021, eq. 3, by hand: W x + alpha / r B A x."""
    trainer = made(make_trainer, "sequential", settings={"r": 4, "lora_alpha": 6})
    layer = next(iter(layers_of_others(backbone_of(trainer.model)).values()))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape == (4, 48) and up.shape == (48, 4) and not up.any()
    torch.nn.init.normal_(up)
    features = torch.randn(3, 48)
    by_hand = layer.base_layer(features) + 6 / 4 * features @ down.T @ up.T
    torch.testing.assert_close(layer(features), by_hand)


# ------------------------------------------------------------------------------------------------ what learns, when


@pytest.mark.parametrize("name", LORA)
def test_lora_learns_in_its_tasks_alone_and_the_base_model_stays(name, tiny_vit, make_trainer):
    watch = Watch()
    trainer = made(make_trainer, name, watch)
    trainer.train()
    plain = tiny_vit()
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(plain))
    for first, second in zip(watch.weights, watch.weights[1:], strict=False):
        moved = {part for part, value in second.items() if not torch.equal(value, first[part])}
        assert bool(moved) == (name == "sequential")
        assert all("lora_" in part for part in moved)
    kept = {
        part.replace(".base_layer.", "."): value for part, value in watch.weights[-1].items() if "lora_" not in part
    }
    assert all(torch.equal(kept[part], value) for part, value in plain.vit.state_dict().items())


def test_after_the_first_session_features_are_kept_and_a_computed_head_is_exact(make_trainer):
    trainer = made(make_trainer, "first+lda")
    trainer.train()
    assert [task["took"]["steps"] for task in trainer.learnt] == [3, 0, 0]
    assert trainer.queries._queries  # features of test images, computed once
    assert trainer.tuner.head.active.training_head is None
    trainable = sum(value.requires_grad for value in trainer.model.parameters())
    assert trainable == 0 and trainer.model.get_nb_trainable_parameters()[0] == 0
    # LDA on the backbone with LoRA in it from the start: nothing of it was computed from other features.
    base = ViTForImageClassification.from_pretrained(trainer.folder / "backbone")
    again = make_trainer(None, model=get_peft_model(base, LinearProbeConfig(**LDA)), folder="again")
    again.train()
    sums, expected = trainer.tuner.head.active.going_on(), again.tuner.head.active.going_on()
    for part, value in sums.items():
        torch.testing.assert_close(value, expected[part], rtol=1e-4, atol=1e-3)


def test_the_linear_head_goes_on_after_the_first_session(make_trainer):
    trainer = made(make_trainer, "first")
    trainer.train()
    assert [task["took"]["steps"] for task in trainer.learnt] == [3, 3, 3]
    assert trainer.results.trainable_parameters == 2 * 6 * 8 * 96 + 2 * 49  # LoRA and the rows of two classes
    assert trainer.model.get_nb_trainable_parameters()[0] == 6 * 49
    with trainer.model.disable_adapter():
        pass
    trainer.train_task({"train": images(2, 3), "test": images(2, 4)}, name="more")  # PEFT unfreezes what was off
    assert not any(value.requires_grad for value in parameters_of_others(backbone_of(trainer.model)))


def test_lora_has_a_rate_of_its_own(make_trainer):
    trainer = made(make_trainer, "sequential", settings={"learning_rate": 1e-4}, max_steps=1)
    trainer.train_task(trainer.scenario[0])
    own = {id(value) for value in parameters_of_others(backbone_of(trainer.model))}
    rates = {
        ("lora" if id(value) in own else "head"): group["initial_lr"]
        for group in trainer.optimizer.param_groups
        for value in group["params"]
    }
    assert rates == {"lora": 1e-4, "head": 1e-2}


def test_ewc_holds_lora(make_trainer):
    ewc = EWC(10.0, 8)
    trainer = made(make_trainer, "sequential", ewc, num_tasks=2)
    trainer.train()
    assert trainer.results.method == "Sequential LoRA + EWC"
    assert sum("lora_" in part for part in ewc.curvature) == 2 * 2 * 6


def test_lora_learns_a_stream(make_trainer, data):
    stream = task_free(data, 3, seed=0)
    words = {"scenario": stream, "num_train_epochs": 1, "lr_scheduler_type": "constant"}
    trainer = make_trainer(config_of("sequential"), strategy=SequentialLoRA(), **words)
    trainer.train()
    assert any(value.any() for value in parameters_of_others(backbone_of(trainer.model))[1::2])
    for strategy in (FirstSessionLoRA(), OSF()):
        with pytest.raises(ValueError, match=f"{strategy.name} needs tasks with an end"):
            make_trainer(config_of("first"), strategy=strategy, **words)


# ------------------------------------------------------------------------------------------------ OSF


def test_more_directions_are_preserved_from_task_to_task():
    assert [preserved_rank(48, task, 0.5, 0.25) for task in range(4)] == [24, 36, 47, 47]
    assert [preserved_rank(48, task, 8, 4) for task in range(3)] == [8, 12, 16]
    assert preserved_rank(48, 0, 0.001, 0) == 1 and preserved_rank(48, 5, 0.5, 2) == 34


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_the_preserved_subspace_does_not_move(optimizer, make_trainer):
    """W V_high and U_high W are what they were at the task's start: with gradients as they are, to rounding. Adam
    divides them number by number, so that it moves both a little."""
    watch = Watch()
    rate = 0.1 if optimizer == "sgd" else 1e-3
    trainer = made(
        make_trainer, "osf", watch, optim=optimizer, learning_rate=rate, settings={"rank_growth": 0.25}, num_tasks=3
    )
    trainer.train()
    assert watch.ranks == [{24}, {36}, {47}]
    assert not layers_of_others(backbone_of(trainer.model))  # between tasks the weights are plain
    part = "layers.0.mlp.fc1.weight"
    for task, (before, after) in enumerate(zip(watch.weights, watch.weights[1:], strict=False), start=1):
        weight, change = before[part], after[part] - before[part]
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        rank = preserved_rank(48, task, 0.5, 0.25)
        along = max((change @ right[:rank].T).norm(), (left[:, :rank].T @ change).norm()) / change.norm()
        assert change.norm() > 1e-3
        assert along < 1e-3 if optimizer == "sgd" else 1e-2 < along < 0.9


# ------------------------------------------------------------------------------------------------ backbones


@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_values_are_found_in_every_family(name):
    base = tiny_backbone(name)
    model = get_peft_model(base, LinearProbeConfig(train_mask=False))
    model.begin_task(["cat", "dog"])
    strategy = SequentialLoRA()
    strategy.check(model, None)
    strategy.prepare(model)
    backbone = backbone_of(model)
    layers = layers_of_others(backbone)
    assert len(layers) == 2 * 3
    assert all(re.fullmatch(r"q_proj|v_proj|query|value", part.rpartition(".")[2]) for part in layers)
    for value in parameters_of_others(backbone):
        torch.nn.init.normal_(value, std=0.3)
    pixels = PIXELS[:, :, :16, :16]
    found, plain = logits(model, pixels), merged(backbone)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, pixels), found[:, :1])
    model.base_model.encoder.base_layer = plain
    torch.testing.assert_close(found, logits(model, pixels), rtol=1e-3, atol=1e-4)


def test_a_backbone_without_attention_needs_names(make_trainer):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = get_peft_model(ResNetForImageClassification(config), LinearProbeConfig(train_mask=False))
    with pytest.raises(ValueError, match="ResNetModel has no projections of queries and values. Name layers of it"):
        make_trainer(None, model=model, strategy=SequentialLoRA())
    with pytest.raises(ValueError, match="target_modules is 'all-linear', but ResNetModel has no linear layers"):
        make_trainer(None, model=model, strategy=SequentialLoRA(target_modules="all-linear"))
    with pytest.raises(ValueError, match="'.*convolution', which is no linear layer, but OSF decomposes matrices"):
        make_trainer(None, model=model, strategy=OSF(target_modules=["convolution"]))
    trainer = make_trainer(None, model=model, strategy=SequentialLoRA(target_modules=["convolution"]), num_tasks=2)
    trainer.train()
    base = AutoModelForImageClassification.from_pretrained(trainer.folder / "backbone")
    loaded = PeftModel.from_pretrained(base, trainer.folder)
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-3, atol=1e-3)


def test_lora_in_a_backbone_of_16_bits_is_float32(make_trainer, tiny_vit):
    model = get_peft_model(tiny_vit().bfloat16(), config_of("first"))
    trainer = make_trainer(None, model=model, strategy=FirstSessionLoRA(), num_tasks=2, num_train_epochs=1)
    assert {value.dtype for value in parameters_of_others(backbone_of(model))} == {torch.float32}
    trainer.train()
    base = AutoModelForImageClassification.from_pretrained(trainer.folder / "backbone")
    assert base.dtype == torch.bfloat16  # what was merged is rounded
    loaded = PeftModel.from_pretrained(base, trainer.folder)
    torch.testing.assert_close(logits(loaded).float(), logits(model).float(), rtol=0.05, atol=0.1)
    with pytest.raises(
        ValueError, match="The backbone is torch.bfloat16, .* but OSF trains them. Load it with dtype="
    ):
        make_trainer(None, model=get_peft_model(tiny_vit().bfloat16(), config_of("osf")), strategy=OSF(), folder="16")


@pytest.mark.parametrize("strategy", [SequentialLoRA(), OSF()], ids=lambda strategy: strategy.name)
def test_a_quantised_backbone_is_refused(strategy, make_trainer, tiny_vit):
    base = tiny_vit()
    told.TestQuantisedBackbones.quantised(base.vit)
    with pytest.raises(
        ValueError, match=f"quantised, .*but {strategy.name} (saves|trains) them.*without quantisation"
    ):
        make_trainer(None, model=get_peft_model(base, config_of("osf")), strategy=strategy)


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda"])
@pytest.mark.parametrize("kind", [SequentialLoRA, FirstSessionLoRA, OSF])
def test_prompts_are_refused(kind, name, make_trainer):
    message = "whose prompts are learnt for a frozen backbone, but .* Use it on a linear probe"
    with pytest.raises(ValueError, match=message):
        make_trainer(CONFIGS[name](), strategy=kind())


@pytest.mark.parametrize("kind", [SequentialLoRA, OSF])
def test_a_computed_head_is_refused_where_features_change(kind, make_trainer):
    with pytest.raises(ValueError, match=f"head is 'lda', .* {kind.name} changes all features with each task"):
        make_trainer(LinearProbeConfig(**LDA), strategy=kind())


def test_one_strategy_trains_the_backbone(make_trainer):
    for pair in ([FineTuning(), SequentialLoRA()], [OSF(), FirstSessionLoRA()]):
        with pytest.raises(ValueError, match=f"{pair[0].name} and {pair[1].name} cannot be combined: .*Give one of"):
            make_trainer(config_of("osf"), strategy=pair)


def test_layers_of_somebody_else_are_told_of(make_trainer):
    model = get_peft_model(ViTForImageClassification(tiny_backbone("vit").config), config_of("osf"))
    inject_adapter_in_model(OSFConfig(target_modules=["q_proj"]), backbone_of(model), "default")
    with pytest.raises(ValueError, match="has 3 layers of Linear in it, which are not those of Sequential LoRA"):
        SequentialLoRA().check(model, None)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        *((kind, {"r": r}, r"r is .*, but must be a whole number of at least 1. Give") for kind in
          (SequentialLoRA, FirstSessionLoRA) for r in (0, True, 2.5, "8")),
        *((SequentialLoRA, {"lora_alpha": value}, "lora_alpha is .*, but must be a number above 0. Give one such as 1")
          for value in (0, -1, float("nan"), True, None)),
        *((SequentialLoRA, {"learning_rate": value}, "learning_rate is .*, but must be a number above 0. Give one")
          for value in (0, float("inf"), "fast")),
        *((kind, {"target_modules": value}, r"target_modules is .*, but must be a list of names of layers, or 'all-l")
          for kind in (SequentialLoRA, OSF) for value in ([], "q_proj", [1], [""], 3)),
        *((OSF, {"effective_rank": value}, "effective_rank is .*, but must be a fraction .* at least 1. Give one")
          for value in (0, 1.0, -0.5, True, float("nan"), "half")),
        *((OSF, {"rank_growth": value}, "rank_growth is .*, but must be a fraction above 0 .* at least 0. Give one")
          for value in (-1, 1.5, True, None)),
    ],
)  # fmt: skip
def test_bad_settings(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_names_that_the_backbone_does_not_have(make_trainer):
    message = (
        r"target_modules names \['querry'\], but ViTModel has no such layers. Name others; its last linear ones are "
        r".*fc2\."
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(config_of("first"), strategy=SequentialLoRA(target_modules=["querry", "v_proj"]))
    with pytest.raises(ValueError, match="drift_compensation is 'map', but under First-session LoRA no features move"):
        make_trainer(LinearProbeConfig(**LDA, drift_compensation="map"), strategy=FirstSessionLoRA())


def test_names_in_tables(make_trainer):
    titles = {name: made(make_trainer, name).results.method for name in ALL}
    assert titles == {
        "sequential": "Sequential LoRA",
        "first": "First-session LoRA",
        "first+lda": "First-session LoRA + LDA",
        "osf": "OSF",
    }
