"""HAT: gates on units, what they guard, and how they are learnt."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from isolating_cases import (
    GOLDEN,
    SIZES,
    Watch,
    all_weights,
    check_resumes,
    make_whole,  # noqa: F401
    pixels,
)
from peft import AutoPeftModel, get_peft_model
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from peft_cl import LinearProbeConfig, Strategy, task_incremental
from peft_cl.strategies import FineTuning, hat
from peft_cl.strategies.hat import HAT, annealed, compensated, free_share, gated, gated_units, regulariser
from peft_cl.strategies.packnet import PackNet


def test_hat_computes_what_the_authors_code_computes():
    """Golden: github.com/joansj/hat (ed35d72), approaches/hat.py and networks/mlp_hat.py, in float64: two tasks of one
    epoch on an MLP of two hidden layers of 4 units, SGD, four batches of 2 images. Of s that code takes i / B where
    eq. 3 has i / (B - 1)."""
    golden = json.loads((GOLDEN / "hat.json").read_text())
    weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in golden["start"].items()}
    smax, strength, rate = golden["smax"], golden["strength"], golden["rate"]
    images, labels = torch.tensor(golden["images"], dtype=torch.float64), torch.tensor(golden["labels"])
    layers, used = ("fc1", "fc2"), torch.zeros(8, dtype=torch.float64)
    for task in (0, 1):
        embedding = torch.cat([weights[f"e{name}.weight"][task] for name in layers])
        trained = [f"{name}.{kind}" for name in (*layers, f"last.{task}") for kind in ("weight", "bias")]
        shares = {
            "fc1.weight": free_share(used[:4], used.new_ones(1)),
            "fc1.bias": 1 - used[:4],
            "fc2.weight": free_share(used[4:], used[:4]),
            "fc2.bias": 1 - used[4:],
        }
        for start in range(0, 8, 2):
            scale = (smax - 1 / smax) * start / 8 + 1 / smax
            embedding = embedding.detach().requires_grad_()
            now = {name: weights[name].requires_grad_() for name in trained}
            hidden = images[task, start : start + 2]
            for place, name in enumerate(layers):
                hidden = F.linear(hidden, now[f"{name}.weight"], now[f"{name}.bias"]).relu()
                span = slice(4 * place, 4 * place + 4)
                (hidden,) = gated(torch.nn.Identity(), (hidden,), embedding=embedding, units=span, scale=scale)
            logits = F.linear(hidden, now[f"last.{task}.weight"], now[f"last.{task}.bias"])
            loss = F.cross_entropy(logits, labels[task, start : start + 2])
            loss = loss + strength * regulariser(torch.sigmoid(scale * embedding), used)
            *gradients, of_embedding = torch.autograd.grad(loss, [*now.values(), embedding])
            with torch.no_grad():
                for name, gradient in zip(trained, gradients, strict=True):
                    weights[name] = weights[name] - rate * shares.get(name, 1.0) * gradient
                embedding = embedding - rate * compensated(of_embedding, embedding, scale, smax)
        for place, name in enumerate(layers):
            weights[f"e{name}.weight"][task] = embedding[4 * place : 4 * place + 4]
        used = torch.maximum(used, torch.sigmoid(smax * embedding))
        torch.testing.assert_close(used, torch.tensor(golden["used"][task], dtype=torch.float64).flatten())
    for name, value in golden["end"].items():
        torch.testing.assert_close(weights[name].detach(), torch.tensor(value, dtype=torch.float64))


def test_hats_formulas_by_hand():
    assert [annealed(step, 3, 4.0) for step in (1, 2, 3)] == [0.25, 2.125, 4.0]  # eq. 3
    assert annealed(1, 1, 400.0) == 400.0
    # Eq. 2: a weight is free as far as one of its two units is.
    share = free_share(torch.tensor([1.0, 0.25]), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(share, torch.tensor([[0.0, 0.5, 1.0], [0.75, 0.75, 1.0]]))
    # Eq. 4 with the derivatives of the sigmoid, of which eq. 5 is the stable form.
    embedding, scale = torch.linspace(-2, 2, 9, dtype=torch.float64), 3.0
    slope = lambda x: torch.sigmoid(x) * torch.sigmoid(-x)  # noqa: E731
    by_hand = 10.0 * slope(embedding) / (scale * slope(scale * embedding))
    torch.testing.assert_close(compensated(torch.ones_like(embedding), embedding, scale, 10.0), by_hand)
    assert compensated(torch.ones(1), torch.tensor([6.0]), 400.0, 400.0).isfinite().all()
    # Eq. 7: (0.5 * 1 + 0.5 * 0.5 + 1 * 0) / (1 + 0.5 + 0)
    found = regulariser(torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0.0, 0.5, 1.0]))
    assert found.item() == pytest.approx(0.5)
    assert regulariser(torch.ones(2), torch.ones(2)) == 0


TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONES = {
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**TINY, intermediate_size=48)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**TINY, mlp_ratio=2)),
    "swiglu": lambda: Dinov2ForImageClassification(Dinov2Config(**TINY, mlp_ratio=2, use_swiglu_ffn=True)),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_units_of_other_families(name):
    model = get_peft_model(BACKBONES[name](), LinearProbeConfig())
    units = gated_units(model.base_model.encoder)
    assert len(units) == 4 and [each.count for each in units.values()] == [24, 32 if name == "swiglu" else 48] * 2
    for path, each in units.items():
        assert model.base_model.encoder.base_layer.get_submodule(path) is each.reader
        assert len(each.producers) == (2 if name == "swiglu" and "mlp" in path else 1)
    # What the gates of 0 shut off has no influence, whatever makes it.
    strategy = HAT()
    FineTuning().prepare(model)
    strategy.prepare(model)
    model.base_model.begin_task(["a", "b"])
    ends = max(each.span.stop for each in units.values())
    strategy.embeddings = [torch.where(torch.arange(ends) % 3 == 0, -6.0, 6.0)]
    model.eval()
    with torch.no_grad():
        before = model(pixel_values=pixels()).logits
        for each in units.values():
            shut = torch.arange(ends)[each.span] % 3 == 0
            for producer in each.producers:
                producer.weight[shut] += 1.0
        torch.testing.assert_close(model(pixel_values=pixels()).logits, before, rtol=0, atol=1e-6)
        strategy.embeddings = []
        assert not torch.allclose(model(pixel_values=pixels()).logits, before, atol=1e-3)


def test_hat_refuses_backbones_whose_units_are_not_known(make_trainer, data):
    swin = SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    resnet = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    swin, resnet = (get_peft_model(base, LinearProbeConfig()) for base in (swin, resnet))
    for model, kind in ((swin, "SwinModel"), (resnet, "ResNetModel")):
        with pytest.raises(ValueError, match=f"The backbone is a {kind}, but HAT gates the units.*or PackNet"):
            HAT().check(model, task_incremental(data, 3))
    PackNet().check(swin, task_incremental(data, 3))
    with pytest.raises(ValueError, match="The backbone has BatchNorm2d, whose running statistics every batch changes"):
        PackNet().check(resnet, task_incremental(data, 3))


class Saturated(Strategy):
    """Gates that are 0 or 1 from the beginning of a task."""

    def begin_task(self, trainer, task):
        strategy = trainer.strategy.strategies[1]
        with torch.no_grad():
            strategy.embeddings[-1].copy_(strategy.embeddings[-1].sign() * 3)


@pytest.fixture
def attended(make):
    """A run of three tasks with saturated gates, and at the end of each: weights, and logits under the first task."""

    def look(trainer, task):
        with torch.no_grad():
            ids = torch.zeros(8, dtype=torch.long)
            logits = trainer.model.eval()(pixel_values=pixels(), task_ids=ids).logits
        return {"weights": all_weights(trainer), "logits": logits[:, :2]}

    strategy, watch = HAT(embedding_rate=1e-4), Watch(look)
    trainer = make(strategy, Saturated(), watch)
    trainer.train()
    return trainer, strategy, watch.seen


def test_hat_keeps_what_earlier_tasks_use(attended):
    trainer, strategy, seen = attended
    assert (seen[0]["weights"].keys()) == seen[2]["weights"].keys()
    used = torch.sigmoid(400 * strategy.embeddings[0]) > 0.5
    gated_weights = {}
    for units in strategy._units.values():
        own = used[units.span]
        gated_weights[id(units.reader.weight)] = own.expand_as(units.reader.weight)
        for producer in units.producers:
            gated_weights[id(producer.weight)] = own[:, None].expand_as(producer.weight)
            gated_weights[id(producer.bias)] = own
    names = {name: id(value) for name, value in trainer.tuner.lasting_parameters().items()}
    fixed = 0
    for name, value in seen[0]["weights"].items():
        now = seen[2]["weights"][name][: len(value)]
        held = gated_weights.get(names[name])
        if held is None:  # queries, keys, norms, embeddings, what is added to the stream; the head's rows
            assert torch.equal(now, value), name
            fixed += 1
        else:
            assert torch.equal(now[held], value[held]) and not torch.equal(now[~held], value[~held]), name
    assert fixed > 20
    for later in seen[1:]:
        torch.testing.assert_close(later["logits"], seen[0]["logits"], rtol=0, atol=1e-5)
    matrix = trainer.accuracy_matrix
    assert all((matrix[task:, task] == matrix[task, task]).all() for task in range(3))
    assert not torch.allclose(seen[0]["logits"], seen[2]["logits"] * 0)


def test_what_hat_saves_gives_each_tasks_network(attended):
    trainer, strategy, _ = attended
    folder = trainer.folder
    with torch.no_grad():
        for task in range(3):
            ids = torch.full((8,), task)
            expected = trainer.model.eval()(pixel_values=pixels(), task_ids=ids).logits
            model = AutoPeftModel.from_pretrained(folder).eval()
            assert not torch.allclose(model(pixel_values=pixels(), task_ids=ids).logits, expected, atol=1e-3)
            hat.apply_task(model, folder, task)
            found = model(pixel_values=pixels(), task_ids=ids).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        # The newest task's, where no task is named; and of several in one batch each its own.
        newest = trainer.model(pixel_values=pixels()).logits[:, 4:]
        torch.testing.assert_close(newest, expected[:, 4:], rtol=0, atol=1e-5)
        mixed = trainer.model(pixel_values=pixels(), task_ids=torch.tensor([0, 2] * 4)).logits
        torch.testing.assert_close(mixed[1::2], expected[1::2], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="task is 0, but the model was reduced to the network of task 2"):
        hat.apply_task(model, folder, 0)
    with pytest.raises(ValueError, match="has no hat_gates.safetensors, which HAT writes"):
        hat.apply_task(model, folder / "_state", 0)
    assert trainer.strategy.kept_bytes(trainer) == {"gates": 3 * 2 * (24 + 48) * 4}


def test_hat_leaves_nothing_behind(attended, tiny_vit):
    trainer, strategy, _ = attended
    model = trainer.model.eval()
    plain = get_peft_model(tiny_vit(**SIZES), LinearProbeConfig()).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        expected = model(pixel_values=pixels()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(pixel_values=pixels()).logits, expected, rtol=0, atol=0)
            other.base_model.encoder.base_layer.layers[0].mlp.fc2.weight.zero_()
        torch.testing.assert_close(model(pixel_values=pixels()).logits, expected, rtol=0, atol=0)
        base = tiny_vit(**SIZES)
        base.vit.load_state_dict(model.base_model.encoder.base_layer.state_dict())
        with model.disable_adapter():
            torch.testing.assert_close(model(pixel_values=pixels()).logits, base(pixels()).logits)
        assert not any(module._forward_pre_hooks for module in model.base_model.encoder.base_layer.modules())
        unloaded = model.unload()
        torch.testing.assert_close(unloaded(pixels()).logits, base(pixels()).logits)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unloaded.modules())


def test_a_step_of_sgd_is_eq_2(make):
    seen = []

    class Before(Strategy):
        def after_backward(self, trainer):
            gradients = {name: value.grad.clone() for name, value in trainer.tuner.lasting_parameters().items()}
            seen.append((all_weights(trainer), gradients, trainer.strategy.strategies[1].used()))

        def after_step(self, trainer):
            seen[-1] += (all_weights(trainer),)

    strategy = HAT(smax=2.0)  # gates between 0 and 1
    trainer = make(strategy, Before(), num_tasks=2, optim="sgd", weight_decay=0.0, max_grad_norm=0.0, max_steps=2)
    trainer.args.lr_scheduler_type = "constant"
    trainer.train()
    before, gradients, used, after = seen[2]
    assert ((0.05 < used) & (used < 0.95)).float().mean() > 0.8
    named = {id(value): name for name, value in trainer.tuner.lasting_parameters().items()}
    for units in strategy._units.values():
        own = used[units.span]
        for weight, free in (
            (units.reader.weight, 1 - torch.minimum(torch.ones(24, 1), own[None, :])),
            (units.producers[0].weight, 1 - torch.minimum(own[:, None], torch.ones(1, 24))),
            (units.producers[0].bias, 1 - own),
        ):
            name = named[id(weight)]
            torch.testing.assert_close(after[name], before[name] - 1e-3 * free * gradients[name], rtol=0, atol=1e-7)


def test_embeddings_take_steps_of_their_own(make):
    """By hand: the compensated gradient of cross-entropy and regulariser, at a rate that follows the schedule."""
    seen = []

    class Look(Strategy):
        def losses(self, trainer, inputs, logits):
            own = trainer.strategy.strategies[1]
            seen.append({"scale": own.scale, "before": own.embeddings[-1].detach().clone()})
            return {}

        def after_backward(self, trainer):
            seen[-1]["gradient"] = trainer.strategy.strategies[1].embeddings[-1].grad.clone()

        def after_step(self, trainer):
            seen[-1] |= {
                "after": trainer.strategy.strategies[1].embeddings[-1].detach().clone(),
                "rate": trainer.optimizer.param_groups[0]["lr"],
            }

    trainer = make(HAT(embedding_rate=2.0), Look(), num_tasks=2)
    trainer.train()
    expected = [1 / 400 + (400 - 1 / 400) * place / 5 for place in range(6)] * 4  # six batches in an epoch
    assert [each["scale"] for each in seen] == pytest.approx(expected)
    assert all(seen[place]["gradient"].any() for place in (0, 1, 6, 7, 12, 13))  # later, gates are 0 or 1 already
    for each in seen:
        step = 2.0 * each["rate"] / 1e-3 * each["gradient"]
        torch.testing.assert_close(each["after"], (each["before"] - step).clamp(-6, 6))
    assert math.isclose(seen[0]["rate"], 1e-3) and seen[-1]["rate"] < 2e-4


def test_the_regulariser_spends_capacity(make):
    used = {}
    for strength in (0.0, 20.0):
        strategy = HAT(strength=strength, embedding_rate=2.0)
        make(strategy, folder=f"run {strength}", num_tasks=2).train()
        gates = [torch.sigmoid(400 * embedding) for embedding in strategy.embeddings]
        used[strength] = [gates[0].mean().item(), (gates[1] * (1 - gates[0])).sum().item() / 144]
    assert used[20.0][0] < 0.8 * used[0.0][0] and used[20.0][1] < 0.8 * used[0.0][1]


def test_gates_are_there_when_layers_are_run_again_in_the_backward_pass(make):
    found = []
    for reentrant in (None, False, True):
        more = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = make(HAT(), folder=f"{reentrant}", max_steps=3, gradient_checkpointing=bool(more), **more)
        trainer.train_task(trainer.scenario[0])
        found.append((all_weights(trainer), trainer.strategy.strategies[1].embeddings[0].detach()))
    for weights, embedding in found[1:]:
        torch.testing.assert_close(weights, found[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(embedding, found[0][1], rtol=0, atol=1e-5)


def test_two_batches_a_step_are_one_of_both(make):
    found = []
    for folder, more in (
        ("one", {"per_device_train_batch_size": 8}),
        ("two", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ):
        trainer = make(HAT(), folder=folder, optim="sgd", num_tasks=2, **more)
        trainer.train()
        found.append((all_weights(trainer), trainer.strategy.strategies[1].embeddings))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-4)


def test_hat_goes_on_in_the_middle_of_a_task(make):
    check_resumes(make, HAT, task=1, step=6)


def test_hat_is_not_compiled(make):
    trainer = make(HAT())
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match="torch_compile is True, but HAT puts gates into the layers"):
        trainer.train()
