"""Methods that hold weights, EWC and SI; and, of all that hold or distil, interruptions, processes and settings."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from holding_cases import ON, l2p, logits_of, pixels_of, probe, trainer_on, weights_of
from test_interruption import run as run_one
from test_interruption import same
from test_processes import check_same
from test_processes import run as run_processes
from trainer_cases import whole_and_resumed
from transformers import TrainerCallback

from peft_cl import CodaPromptConfig, LinearProbeConfig, Strategy, task_free
from peft_cl.strategies import EWC
from peft_cl.strategies.ewc import padded, penalty, sum_of_parabolas
from peft_cl.strategies.lwf import LearningWithoutForgetting
from peft_cl.strategies.slow_learner import SlowLearner
from peft_cl.strategies.synaptic_intelligence import (
    SynapticIntelligence,
    importance_after,
    path_of_step,
    penalty_gradient,
)


# ------------------------------------------------------------------------------------------------- EWC


def test_online_ewcs_curvature_fades_as_avalanches_does(make_trainer):
    """Golden numbers: `EWCPlugin(mode="online", decay_factor=0.9).update_importances` of Avalanche 0.6.0, on a head of
    two rows that grows to three."""
    fishers = torch.linspace(0.1, 0.6, 6).view(2, 3), torch.linspace(0.9, 0.1, 9).view(3, 3)
    ewc = EWC(online=True, decay=0.9)
    values = [{"weight": torch.nn.Parameter(torch.full_like(fisher, k))} for k, fisher in enumerate(fishers)]
    for fisher, parameters in zip(fishers, values, strict=True):
        ewc._fisher = lambda *words, fisher=fisher: {"weight": fisher}
        ewc.end_task(SimpleNamespace(tuner=SimpleNamespace(lasting_parameters=lambda of=parameters: of)), None)
    golden = [
        [0.9899999499320984, 0.9799999594688416, 0.9700000286102295],
        [0.9600000381469727, 0.9499999284744263, 0.9399999976158142],
        [0.29999998211860657, 0.19999998807907104, 0.10000000149011612],
    ]
    torch.testing.assert_close(ewc.curvature["weight"], torch.tensor(golden))
    assert torch.equal(ewc.centre["weight"], torch.ones(3, 3))  # the latest weights
    assert ewc.kept_bytes(None) == {"Fisher information": 9 * 4}


def test_the_penalty_holds_the_rows_there_were():
    held = {"weight": torch.tensor([[2.0, 0.0]]), "scale": torch.tensor(3.0)}
    centre = {"weight": torch.tensor([[1.0, 1.0]]), "scale": torch.tensor(0.0)}
    now = {"weight": torch.tensor([[3.0, 9.0], [9.0, 9.0]]), "scale": torch.tensor(2.0), "new": torch.ones(1)}
    assert penalty(now, held, centre) == 2 * (3 - 1) ** 2 + 3 * (2 - 0) ** 2
    assert torch.equal(padded(torch.ones(1, 2), torch.zeros(3, 2)), torch.tensor([[1.0, 1], [0, 0], [0, 0]]))


def test_two_parabolas_are_one():
    known, fisher = torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [0.0], [2.0]])
    centre, value = torch.tensor([[4.0], [7.0]]), torch.tensor([[8.0], [5.0], [6.0]])
    total, middle = sum_of_parabolas(known, centre, fisher, value)
    assert total.flatten().tolist() == [4, 0, 2] and middle.flatten().tolist() == [7, 5, 6]


def test_both_kinds_of_ewc_say_what_they_keep(make_trainer):
    found = {}
    for online in (False, True):
        ewc = EWC(10.0, 4, online=online)
        trainer = trainer_on(make_trainer, "l2p", ewc, num_tasks=2, folder=str(online), config=l2p(head="cosine"))
        trainer.train()
        assert trainer.results.method == f"L2P + cosine + {'online EWC' if online else 'EWC'}"
        found[online] = trainer.results.kept_bytes["Fisher information"]
        card = (trainer.folder / "README.md").read_text()
        assert "In class-incremental learning it forgets about as much as plain fine-tuning" in card
    held = sum(value.numel() * 4 for value in ewc.curvature.values())
    assert held > 1000 and found == {False: 2 * held, True: held}


# ------------------------------------------------------------------------------------------------- SI


def test_the_importance_is_that_of_avalanche():
    """Golden numbers: SynapticIntelligencePlugin(0.0, eps=0.01) of Avalanche 0.6.0, before it clips them, with an
    `extract_weights` that copies: on the CPU its weights before a step are views of those after it."""
    golden = [
        {
            "weight": [0.4723122715950, 0.3662036657333, 0.1857941448689, 0.3539070785046, 0.2785054743290, 0.3329316],
            "bias": [0.3017160892487, 0.3606559634209],
        },
        {
            "weight": [0.7565258741379, 0.6807707548141, 0.5209063291550, 0.7390932440758, 0.4491945505142, 0.6142191],
            "bias": [0.6677607297897, 0.3895246386528],
        },
    ]  # fmt: skip
    net = torch.nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.linspace(-0.5, 0.5, 6).view(2, 3))
        net.bias.copy_(torch.tensor([0.1, -0.2]))
    inputs = torch.sin(torch.arange(12.0)).view(4, 3)
    importance = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    for targets, expected in zip(
        (torch.cos(torch.arange(8.0)), torch.sin(torch.arange(8.0) * 2)), golden, strict=True
    ):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        start = {name: value.detach().clone() for name, value in net.named_parameters()}
        path = {name: torch.zeros_like(value) for name, value in start.items()}
        for _ in range(6):
            before = {name: value.detach().clone() for name, value in net.named_parameters()}
            optimizer.zero_grad()
            (net(inputs) - targets.view(4, 2)).square().mean().backward()
            optimizer.step()
            for name, value in net.named_parameters():
                path[name] += path_of_step(value.grad, before[name], value.detach())
        for name, value in net.named_parameters():
            importance[name] = importance_after(importance[name], path[name], value.detach() - start[name], 0.01)
            torch.testing.assert_close(importance[name].flatten(), torch.tensor(expected[name]))


def test_on_a_quadratic_the_path_integral_is_the_losss_decrease():
    """Eq. 3: of a loss that is a sum over weights, each omega is what its own weight has brought."""
    curvature, weight = torch.tensor([1.0, 4.0, 0.5]), torch.tensor([2.0, -1.0, 3.0])
    first, path = weight.clone(), torch.zeros(3)
    for _ in range(4000):
        gradient = curvature * weight
        after = weight - 1e-3 * gradient
        path += path_of_step(gradient, weight, after)
        weight = after
    torch.testing.assert_close(path, curvature / 2 * (first.square() - weight.square()), rtol=3e-3, atol=0)
    # Where a quadratic has reached its minimum, omega / Delta^2 is its curvature / 2 (section 4 of the paper).
    torch.testing.assert_close(
        importance_after(torch.zeros(3), path, weight - first, 1e-9)[1], curvature[1] / 2, rtol=3e-3, atol=0
    )


def test_eq_5_and_the_penaltys_gradient_by_hand():
    found = importance_after(torch.tensor([1.0, 1.0]), torch.tensor([0.5, -9.0]), torch.tensor([2.0, 1.0]), 1.0)
    torch.testing.assert_close(found, torch.tensor([1.1, 0.0]))  # 1 + 0.5 / (4 + 1); below 0 is 0
    importance, centre = torch.tensor([[2.0]]), torch.tensor([[1.0], [1.0]])
    value = torch.tensor([[4.0], [4.0]], requires_grad=True)
    penalty({"w": value}, {"w": importance}, {"w": centre}).backward()
    own = penalty_gradient(value.detach(), importance, centre)
    torch.testing.assert_close(padded(own, value), value.grad)


def test_the_path_of_a_task_is_the_decrease_of_its_loss(make_trainer):
    """By the trainer's own steps: one batch of all images, small steps."""
    strategy = SynapticIntelligence()

    class Losses(Strategy):
        found = []
        path = 0.0

        def losses(self, trainer, inputs, logits):
            self.found.append(float(F.cross_entropy(logits.detach(), inputs["labels"])))
            self.path = float(sum(path.sum() for path in strategy.path.values()))
            return {}

    watch = Losses()
    settings = {"optim": "sgd", "learning_rate": 1e-3, "max_steps": 40, "lr_scheduler_type": "constant"}
    trainer = trainer_on(
        make_trainer, "backbone", strategy, watch, num_tasks=2, per_device_train_batch_size=48, **settings
    )
    trainer.train_task(trainer.scenario[0])
    assert watch.found[0] - watch.found[-1] > 0.01
    assert watch.path == pytest.approx(watch.found[0] - watch.found[-1], rel=0.05)
    assert all(value.min() >= 0 for value in strategy.importance.values()) and not strategy.path


class WatchGradient(Strategy):
    """Adds up the gradient of the cross-entropy alone, and compares it with what SI takes a step to have."""

    def __init__(self, si: SynapticIntelligence, parts: int):
        self.si, self.parts, self.sum, self.errors, self.penalties = si, parts, {}, [], []

    def losses(self, trainer, inputs, logits):
        parameters = trainer.tuner.lasting_parameters()
        loss = F.cross_entropy(logits.float(), inputs["labels"]) / self.parts
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                self.sum[name] = self.sum.get(name, 0.0) + gradient
        return {}

    def after_backward(self, trainer):
        for name, value in trainer.tuner.lasting_parameters().items():
            if name in self.sum:
                self.errors.append(float((self.si._step[name][0] - self.sum[name]).abs().max()))
                self.penalties.append(float((value.grad - self.sum[name]).abs().max()))
        self.sum = {}


def test_sis_gradient_is_that_of_the_tasks_loss_alone(make_trainer):
    """With two batches a step, and before gradients are clipped."""
    si = SynapticIntelligence(strength=10.0)
    watch = WatchGradient(si, 2)
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3, "per_device_train_batch_size": 4}
    trainer_on(make_trainer, "backbone", si, watch, num_tasks=2, **settings).train()
    assert max(watch.errors) < 1e-4 < 1e-3 < max(watch.penalties)


def test_sis_gradient_is_free_of_the_loss_scale_and_a_skipped_step_does_not_count(make_trainer):
    """On an accelerator with fp16; here the scaler is a stand-in."""
    si = SynapticIntelligence()
    trainer = trainer_on(make_trainer, "l2p", si, num_tasks=2)
    trainer.tuner.begin_task(trainer.scenario[0].classes)
    si.begin_task(trainer, trainer.scenario[0])
    parameters = trainer.tuner.lasting_parameters()
    name, value = next((name, value) for name, value in parameters.items() if name.endswith("head.default.weight"))
    stub = SimpleNamespace(
        tuner=trainer.tuner,
        accelerator=SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 8.0), optimizer_step_was_skipped=True),
    )
    value.grad = torch.full_like(value, float("inf"))
    si.after_backward(stub)
    si.after_step(stub)
    assert not si.path[name].any()
    value.grad = torch.full_like(value, 16.0)
    si.after_backward(stub)
    with torch.no_grad():
        value -= 0.5
    stub.accelerator.optimizer_step_was_skipped = False
    si.after_step(stub)
    torch.testing.assert_close(si.path[name], torch.ones_like(value))  # -(16 / 8) x -0.5
    assert all(not path.any() for other, path in si.path.items() if other != name)


@pytest.mark.parametrize("on", ON)
def test_si_holds_what_the_first_task_needs(on, make_trainer):
    moved = []
    for strength in (0.0, 1e3):
        si = SynapticIntelligence(strength)
        trainer = trainer_on(make_trainer, on, si, num_tasks=2, folder=str(strength))
        trainer.train_task(trainer.scenario[0])
        importance, centre = dict(si.importance), weights_of(trainer)
        trainer.train_task(trainer.scenario[1])
        moved.append(float(penalty(weights_of(trainer), importance, centre)))
        rows = next(value for name, value in si.importance.items() if name.endswith("head.default.weight"))
        assert len(rows) == 6 and rows[3:].any()  # new classes' rows begin at 0 and gain theirs
    assert moved[1] < 0.5 * moved[0]
    assert trainer.results.kept_bytes == {"importance": sum(4 * v.numel() for v in si.importance.values())}


def test_si_with_prompts_that_are_frozen_after_the_first_task(make_trainer):
    config = CodaPromptConfig(components_per_task=2, prompt_length=4, train_prompts="first_task", train_mask=False)
    si = SynapticIntelligence()
    make_trainer(config, strategy=si, num_tasks=2, num_train_epochs=1).train()
    assert {name.rpartition(".")[2] for name in si.importance} >= {"weight", "bias"}
    assert all(value.isfinite().all() for value in si.importance.values())


# ------------------------------------------------------------------------------------------------- interruption


class Interrupt(TrainerCallback):
    """Stops the run at its checkpoint number `left`."""

    def __init__(self, left: int):
        self.left = left

    def on_save(self, args, state, control, **kwargs):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


CASES = {
    "ewc": ("backbone", lambda: EWC(10.0, 4), (1, 3, 4)),
    "online ewc": ("l2p", lambda: EWC(10.0, 4, online=True), (3,)),
    "si": ("backbone", lambda: SynapticIntelligence(1.0), (3,)),
    "si on l2p": ("l2p", lambda: SynapticIntelligence(1.0), (1, 3, 4)),
    "lwf": ("backbone", LearningWithoutForgetting, (1, 3, 4)),
    "lwf on l2p": ("l2p", LearningWithoutForgetting, (3,)),
}


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[pytest.mark.slow] * (len(CASES[each][2]) > 1)) for each in CASES]
)
def test_a_resumed_run_is_the_whole_one_to_the_bit(case, make_trainer):
    """Interrupted after the first of two tasks; in the middle of the first, of the second, and at the second's end."""
    on, make, cuts = CASES[case]
    settings = {"save_strategy": "steps", "save_steps": 2, "num_tasks": 2, "max_steps": 4}
    whole, again = whole_and_resumed(lambda **words: trainer_on(make_trainer, on, make(), **settings, **words))
    resumed = [again]
    for number in cuts:
        folder = f"cut {number}"
        with pytest.raises(KeyboardInterrupt):
            trainer_on(make_trainer, on, make(), callbacks=[Interrupt(number)], folder=folder, **settings).train()
        resumed.append(trainer_on(make_trainer, on, make(), folder=folder, **settings))
        resumed[-1].train(resume_from_checkpoint=True)
    expected = weights_of(whole)
    for each in resumed:
        found, state = (trainer.strategy.strategies[-1].state_dict() for trainer in (each, whole))
        torch.testing.assert_close((weights_of(each), found), (expected, state), rtol=0, atol=0)
        np.testing.assert_array_equal(each.accuracy_matrix, whole.accuracy_matrix)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["aligned", "lda"])
def test_a_slow_learner_with_a_computed_head_is_resumed_to_the_bit(head, make_trainer):
    def make(**words):
        settings = {"save_strategy": "steps", "save_steps": 2, "num_tasks": 2, "max_steps": 4, **words}
        return make_trainer(LinearProbeConfig(head=head), strategy=SlowLearner(0.1), learning_rate=1e-3, **settings)

    whole, again = whole_and_resumed(make)
    with pytest.raises(KeyboardInterrupt):
        make(folder="cut", callbacks=[Interrupt(3)]).train()
    cut = make(folder="cut")
    cut.train(resume_from_checkpoint=True)
    pixels = pixels_of(whole, whole.scenario[0])
    expected = logits_of(whole, pixels)
    assert torch.equal(logits_of(again, pixels), expected) and torch.equal(logits_of(cut, pixels), expected)


METHODS = ["probe+finetuning+si", "l2p+si", "probe+finetuning+lwf", "l2p+lwf", "l2p+online", "probe+slow+aligned"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "probe+finetuning+si+uneven+accumulated", "probe+slow+lda"])
def test_two_processes_equal_one(method, tmp_path):
    for processes, folder in ((1, "one"), (2, "two")):
        run_processes(processes, tmp_path / folder, method, PLAIN="1", EVALUATE_FIRST="1")
    check_same(tmp_path / "two", tmp_path / "one", 1e-4, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_kill_and_resume_gives_the_same_bits(method, tmp_path):
    method += "+checkpoints"
    whole = run_one(tmp_path / "whole", method)
    assert whole.returncode == 0, whole.stderr
    moments = whole.stdout.splitlines()[-2].split(", ")
    steps = [place for place, kind in enumerate(moments, start=1) if kind == "in a step"]
    run_one(tmp_path / "cut", method, kill_at=steps[len(steps) // 2])
    resumed = run_one(tmp_path / "cut", method, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert same(tmp_path / "cut", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "name", "values", "rule"),
    [
        (SynapticIntelligence, "strength", (-1, True, "1", float("nan"), float("inf")), "a number of at least 0"),
        (SynapticIntelligence, "damping", (0, -1, True, "1", float("nan"), float("inf")), "a number above 0"),
        (LearningWithoutForgetting, "strength", (-1, True, "1", float("nan")), "a number of at least 0"),
        (LearningWithoutForgetting, "temperature", (0, -2, True, "2", float("nan")), "a number above 0"),
        (SlowLearner, "rate_ratio", (0, -1, 1.5, True, "1", float("nan")), "a number above 0 and at most 1"),
        (partial(EWC, online=True), "decay", (-1, 2, True, "1", float("nan")), "a number of at least 0 and at most 1"),
        (EWC, "online", (1, "no", None), "True or False"),
    ],
)
def test_bad_settings(make, name, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=rf"{name} is .*, but must be {rule}. Give one"):
            make(**{name: value})


@pytest.mark.parametrize("strategy", [EWC(online=True), SynapticIntelligence(), LearningWithoutForgetting()])
def test_a_stream_has_no_end_of_a_task(strategy, make_trainer, data):
    with pytest.raises(ValueError, match=f"{strategy.name} needs tasks with an end"):
        make_trainer(
            probe(), strategy=strategy, scenario=task_free(data, 3), num_train_epochs=1, lr_scheduler_type="constant"
        )


def test_a_decay_that_nothing_would_use_is_refused():
    with pytest.raises(ValueError, match="decay is 0.5, but without online=True nothing fades. Set online=True."):
        EWC(decay=0.5)


def test_settings_are_those_that_json_knows():
    assert SynapticIntelligence(np.float32(0.5), np.int64(1)).settings() == {"strength": 0.5, "damping": 1}
    assert EWC(1, 2, online=np.True_).settings() == {
        "strength": 1,
        "fisher_samples": 2,
        "online": True,
        "decay": 0.95,
    }
    assert LearningWithoutForgetting(2, np.int64(4)).settings() == {"strength": 2, "temperature": 4}
    assert SlowLearner(np.float32(0.5)).settings() == {"rate_ratio": 0.5}
