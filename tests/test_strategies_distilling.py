"""Methods that distil from the network before, their teacher, and the slow learner."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from holding_cases import ON, l2p, logits_of, pixels_of, probe, trainer_on
from peft import PeftModel
from transformers import AutoModelForImageClassification

from peft_cl import (
    CodaPromptConfig,
    DualPromptConfig,
    LinearProbeConfig,
    Strategy,
    domain_incremental,
    task_incremental,
)
from peft_cl.strategies import EWC
from peft_cl.strategies.lwf import LearningWithoutForgetting, distillation
from peft_cl.strategies.slow_learner import SlowLearner
from peft_cl.strategies.teacher import Teacher


# ------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("on", ON)
def test_a_teacher_answers_as_the_network_did_and_leaves_no_trace(on, make_trainer):
    config = l2p(frequency_penalty=True) if on == "l2p" else None
    trainer = trainer_on(make_trainer, on, config=config, num_tasks=2)
    trainer.train_task(trainer.scenario[0])
    pixels = pixels_of(trainer, trainer.scenario[0])
    before = logits_of(trainer, pixels)
    teacher = Teacher(trainer)
    with torch.no_grad():
        for value in trainer.tuner.lasting_parameters().values():
            value += 0.1
    assert (logits_of(trainer, pixels) - before).abs().max() > 0.01
    trainer.model.train()
    modes = [module.training for module in trainer.model.modules()]
    buffers = {name: value.clone() for name, value in trainer.model.named_buffers()}
    found = teacher.logits(trainer, {"pixel_values": pixels})
    torch.testing.assert_close(found, before, rtol=0, atol=0)
    assert not found.requires_grad and modes == [module.training for module in trainer.model.modules()]
    assert all(torch.equal(value, buffers[name]) for name, value in trainer.model.named_buffers())
    trained = sum(value.numel() for value in trainer.tuner.lasting_parameters().values())
    copied = sum(value.numel() for value in teacher.weights.values())
    assert trained <= copied < trained + 100  # what is frozen is not copied


@pytest.mark.parametrize("strategies", [[], [SlowLearner(1.0)]], ids=["l2p", "backbone"])
def test_under_a_computed_head_the_trained_one_teaches(strategies, make_trainer):
    config = probe(head="lda", head_features="cls+mean") if strategies else l2p(head="lda", head_features="cls+mean")
    trainer = make_trainer(config, strategy=strategies, num_tasks=2, num_train_epochs=1)
    trainer.train_task(trainer.scenario[0])
    pixels = pixels_of(trainer, trainer.scenario[0])
    found = Teacher(trainer).logits(trainer, {"pixel_values": pixels})
    assert trainer.tuner.head.active.training is False
    with torch.no_grad():  # nothing is drawn in training here
        torch.testing.assert_close(found, trainer.model.train()(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)
    assert (found - logits_of(trainer, pixels)).abs().max() > 1


@pytest.mark.parametrize("config", [CodaPromptConfig, DualPromptConfig])
def test_pools_that_renew_rows_have_no_teacher(config, make_trainer):
    match = r"distils from the network before each task, and this method renews rows .* L2PConfig or LinearProbeConfig"
    with pytest.raises(ValueError, match=match):
        make_trainer(config(train_mask=False), strategy=LearningWithoutForgetting())
    remedy = config(train_mask=False, train_prompts="first_task")
    trainer = make_trainer(remedy, strategy=LearningWithoutForgetting(), num_tasks=2, num_train_epochs=1)
    trainer.train()
    assert any("lwf" in entry for entry in trainer.state.log_history)


# ------------------------------------------------------------------------------------------------- LwF


def test_the_distillation_is_that_of_avalanche():
    """Golden numbers: `_distillation_loss` of Avalanche 0.6.0's LearningWithoutForgetting(1, 2.0), a KL divergence,
    which has the same gradient; and the value of mammoth's `modified_kl_div(smooth(...))`, a cross-entropy."""
    logits = (torch.sin(torch.arange(15.0)) * 2).view(3, 5).requires_grad_()
    taught = (torch.cos(torch.arange(15.0)) * 2).view(3, 5)
    found = distillation(logits, taught, [torch.tensor([0, 1, 2])], 2.0)
    found.backward()
    golden = [
        [-0.0602065771818161, 0.010475830174982548, 0.04973074793815613, 0.0, 0.0],
        [-0.015671351924538612, -0.030702434480190277, 0.04637378081679344, 0.0, 0.0],
        [0.04395559802651405, -0.004505960736423731, -0.03944964334368706, 0.0, 0.0],
    ]
    torch.testing.assert_close(logits.grad, torch.tensor(golden))
    assert found.item() == pytest.approx(1.2222310304641724)
    first, logits.grad = logits.grad, None
    distillation(logits, taught, [torch.tensor([0, 1, 2]), torch.tensor([3, 4])], 2.0).backward()
    other = torch.tensor([0.04897095635533333, -0.007023810874670744, -0.05375652387738228])
    expected = first + F.pad(torch.stack([other, -other], 1), (3, 0))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-7)


def test_the_distillations_gradient_by_hand_and_by_differences():
    generator = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    groups, temperature = [torch.tensor([0, 2]), torch.tensor([1, 3, 4])], 3.0
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: distillation(given, taught, groups, temperature), logits)
    distillation(logits, taught, groups, temperature).backward()
    by_hand = torch.zeros_like(logits)
    for columns in groups:  # (q' - p') / (T B)
        q, p = ((each.detach()[:, columns] / temperature).softmax(-1) for each in (logits, taught))
        by_hand[:, columns] = (q - p) / (temperature * len(logits))
    torch.testing.assert_close(logits.grad, by_hand)


@pytest.mark.parametrize("on", ON)
def test_old_answers_move_less_with_lwf(on, make_trainer):
    moved = []
    for strength in (0.0, 10.0):
        strategy = LearningWithoutForgetting(strength)
        trainer = trainer_on(make_trainer, on, strategy, num_tasks=2, folder=str(strength), num_train_epochs=2)
        trainer.train_task(trainer.scenario[0])
        pixels = pixels_of(trainer, trainer.scenario[1], "train")
        before = logits_of(trainer, pixels).log_softmax(-1)
        assert not any("lwf" in entry for entry in trainer.state.log_history)
        trainer.train_task(trainer.scenario[1])
        assert any("lwf" in entry for entry in trainer.state.log_history) == bool(strength)
        moved.append(float((logits_of(trainer, pixels)[:, :3].log_softmax(-1) - before).abs().mean()))
    assert moved[1] < 0.5 * moved[0]


class WatchLwF(Strategy):
    """Keeps which columns are distilled in each task."""

    def __init__(self, lwf: LearningWithoutForgetting):
        self.lwf, self.columns = lwf, []

    def losses(self, trainer, inputs, logits):
        columns = [group.tolist() for group in self.lwf.old]
        if len(self.columns) <= trainer.task.index:
            self.columns.append(columns)
        return {}


def test_what_is_distilled_depends_on_what_is_known_at_test(make_trainer, data):
    halves = {
        split: part.add_column("domain", ["ab"[i % 2] for i in range(len(part))]) for split, part in data.items()
    }
    expected = {
        "class": [[], [[0, 1]], [[0, 1, 2, 3]]],
        "task": [[], [[0, 1]], [[0, 1], [2, 3]]],
        "domain": [[], [[0, 1, 2, 3, 4, 5]]],
    }
    scenarios = {"class": None, "task": task_incremental(data, 3), "domain": domain_incremental(halves)}
    for kind, scenario in scenarios.items():
        watch = WatchLwF(LearningWithoutForgetting())
        config = probe(train_mask=kind == "task")  # the paper's new head learns by itself
        trainer = make_trainer(config, scenario=scenario, strategy=[watch.lwf, watch], folder=kind, num_train_epochs=1)
        trainer.train()
        assert [list(map(sorted, each)) for each in watch.columns] == expected[kind]


# ------------------------------------------------------------------------------------------------- slow learner


def test_the_backbone_is_slow_and_the_head_is_not(make_trainer):
    moved = {}
    for ratio in (0.01, 1.0):
        trainer = make_trainer(
            probe(), strategy=SlowLearner(ratio), folder=str(ratio), num_train_epochs=1, learning_rate=1e-3
        )
        first = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train_task(trainer.scenario[0])
        rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
        assert rates == {1e-3, 1e-3 * ratio}
        moved[ratio] = max(
            float((value.detach() - first[name]).abs().max())
            for name, value in trainer.model.named_parameters()
            if "head" not in name
        )
    assert 0 < moved[0.01] < 0.02 * moved[1.0]


def test_a_rate_of_the_users_own_comes_before_the_slow_one(make_trainer):
    trainer = make_trainer(
        probe(), strategy=SlowLearner(), learning_rates={"backbone": 5e-4}, num_train_epochs=1, learning_rate=1e-3
    )
    trainer.train_task(trainer.scenario[0])
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3, 5e-4}


def test_names_of_the_slow_learner(make_trainer):
    strategy = SlowLearner()  # one object for several trainers
    for head, title in (("aligned", "SLCA"), ("linear", "Slow fine-tuning"), ("aligned", "SLCA")):
        assert make_trainer(probe(head=head), strategy=strategy).results.method == title
    assert make_trainer(probe(), strategy=[EWC(), SlowLearner()]).results.method == "Slow fine-tuning + EWC"


@pytest.mark.parametrize("head", ["ncm", "lda", "ridge", "aligned"])
def test_any_head_sits_on_the_slow_learner_and_is_loaded_again(head, make_trainer):
    """What a computed head knows is of the backbone as it was after the class's task, and no feature is kept from
    before; in training a linear head stands in for it. The saved model answers as the trained one."""
    trainer = make_trainer(
        LinearProbeConfig(head=head), strategy=SlowLearner(0.1), num_train_epochs=1, learning_rate=1e-3
    )
    trainer.train_task(trainer.scenario[0])
    active = trainer.tuner.head.active
    if head == "ncm":
        pixels = pixels_of(trainer, trainer.scenario[0], "train")
        features = trainer.tuner.features(pixels)[0]
        labels = torch.from_numpy(trainer.scenario.model_labels(trainer.scenario[0], "train"))
        means = torch.stack([features[labels == row].mean(0) for row in range(2)])
        torch.testing.assert_close(active.sums.means.float(), means, rtol=1e-4, atol=1e-4)
    for task in trainer.scenario[1:]:
        trainer.train_task(task)
    assert trainer.metrics["average_accuracy"] > 0.5
    assert (active.training_head is None) == (head == "aligned")
    pixels = pixels_of(trainer, trainer.scenario[0])
    for model in (
        PeftModel.from_pretrained(
            AutoModelForImageClassification.from_pretrained(trainer.folder / "backbone"), trainer.folder
        ),
        AutoModelForImageClassification.from_pretrained(trainer.folder),
    ):
        with torch.no_grad():
            found = model.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(found, logits_of(trainer, pixels), rtol=1e-5, atol=1e-5)
