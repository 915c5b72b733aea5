"""Methods with a memory of images: what they keep, what they change, and that an interruption changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from scipy.optimize import LinearConstraint, minimize
from test_processes import check_same, run
from trainer_cases import CONFIGS, whole_and_resumed
from transformers import TrainerCallback

from peft_cl import CodaPromptConfig, L2PConfig, LinearProbeConfig, Strategy, domain_incremental, task_free
from peft_cl import task_incremental as with_known_tasks
from peft_cl.strategies import EWC, ExperienceReplay, FineTuning
from peft_cl.strategies.dark_experience_replay import DarkExperienceReplay, logit_distance, widened
from peft_cl.strategies.gem import AGEM, GEM, gradient_of, own_batches, project, project_on_reference
from peft_cl.strategies.icarl import ICaRL, herd, sigmoid_loss
from peft_cl.strategies.memory import balanced, even_shares, reservoir_slots
from peft_cl.trainer.processes import kept_counts


EXEMPLARS = {"head": "ncm", "head_options": {"metric": "cosine", "normalize": True}, "head_features": "cls"}
STRATEGIES = {
    "ER": lambda: ExperienceReplay(10, memory="balanced"),
    "GEM": lambda: GEM(10),
    "A-GEM": lambda: AGEM(10),
    "DER++": lambda: DarkExperienceReplay(10),
    "iCaRL": lambda: ICaRL(12),
}


@pytest.fixture
def make_trainer(make_trainer, tiny_vit):
    """The trainer of `conftest`, on two layers."""

    def make(config, **words):
        torch.manual_seed(0)
        if "model" not in words:
            words["model"] = get_peft_model(tiny_vit(num_hidden_layers=2), config)
        return make_trainer(config, **words)

    return make


def config_for(strategy: Strategy, on: str = "linear-probe", **settings):
    config = CONFIGS[on]()
    exemplars = EXEMPLARS if isinstance(strategy, ICaRL) else {}
    for name, value in {"train_mask": False, **exemplars, **settings}.items():
        setattr(config, name, value)
    return config


def on_backbone(make_trainer, *strategies: Strategy, train_mask: bool = False, **training):
    config = config_for(strategies[0], train_mask=train_mask)
    training = {"learning_rate": 1e-3, "num_train_epochs": 1, **training}
    return make_trainer(config, strategy=[FineTuning(), *strategies], **training)


# ------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize(
    ("available", "size", "shares"),
    [
        ([10, 2, 10], 9, [3, 2, 4]),
        ([5, 5, 5], 3, [1, 1, 1]),
        ([2, 1], 9, [2, 1]),
        ([4, 4, 4], 2, [0, 1, 1]),
        ([], 4, []),
    ],
)
def test_places_are_divided_evenly(available, size, shares):
    assert even_shares(available, size) == shares


def test_a_reservoir_gives_each_image_the_same_chance():
    counts = np.zeros(30)
    for seed in range(2000):
        memory = np.full(6, -1)
        slots = reservoir_slots(6, 0, 20, np.random.default_rng([seed, 0]))
        slots = np.concatenate([slots, reservoir_slots(6, 20, 10, np.random.default_rng([seed, 1]))])
        for image, slot in enumerate(slots):
            if slot >= 0:
                memory[slot] = image
        counts += np.bincount(memory, minlength=30)
    assert (abs(counts - 400) < 4.5 * np.sqrt(400 * 0.8)).all()


def test_a_balanced_choice_is_a_uniform_sample_of_each_group():
    groups, counts = np.array([0] * 20 + [1] * 5 + [2]), np.zeros(26)
    for seed in range(500):
        kept = balanced(groups, np.random.default_rng(seed).random(26), 9)
        assert np.bincount(groups[kept]).tolist() == [4, 4, 1]
        counts[kept] += 1
    assert (abs(counts[:20] - 100) < 45).all() and (abs(counts[20:25] - 400) < 45).all() and counts[25] == 500


def test_the_balanced_memory_has_as_many_images_of_each_class_and_only_lets_go(make_trainer):
    trainer, before = make_trainer(config_for(ExperienceReplay())), None
    replay = ExperienceReplay(8, memory="balanced")
    for task, expected in zip(trainer.scenario, ([4, 4], [2, 2, 2, 2], [1, 1, 1, 1, 2, 2]), strict=True):
        replay.end_task(trainer, task)
        assert np.bincount(replay.store.labels(trainer, replay.memory)).tolist() == expected
        now = {tuple(place) for place in replay.memory.tolist()}
        assert len(now) == 8 and (before is None or {place for place in now if place[0] < task.index} <= before)
        before = now


def test_the_memory_is_counted_in_bytes_of_pixels(make_trainer):
    trainer = make_trainer(config_for(ExperienceReplay()), strategy=ExperienceReplay(10), num_train_epochs=1)
    assert trainer.strategy.kept_bytes(trainer) == {"memory": 0}
    trainer.train()
    assert trainer.strategy.kept_bytes(trainer) == {"memory": 10 * 3 * 32 * 32}


# ------------------------------------------------------------------------------------------------------- GEM, A-GEM

# Made by `GEMPlugin(10, margin).solve_quadprog` and `AGEMPlugin.after_backward` of avalanche-lib 0.6.0, in float64.
GRADIENT = [3.8, -4.0, 19.2, 3.1, -16.1, 10.8]
CONSTRAINTS = [
    [39.1, 28.4, -21.1, -38.0, -18.7, 1.2],
    [-69.8, -6.6, -37.4, -22.0, -16.3, -9.5],
    [12.3, 31.3, -3.9, 41.0, -20.0, 10.5],
]
PROJECTED = {
    0.0: [-2.6921463, -2.9733691, 12.9288578, -2.2882054, -19.4643002, 9.6426830],
    0.5: [-5.4, 22.55, -12.0, -6.4, -43.6, 11.9],
}


@pytest.mark.parametrize("margin", PROJECTED)
def test_gem_projects_as_avalanche_does(margin):
    """They add 1e-3 to the diagonal of G G', where norms are 4,000 and more."""
    found = project(torch.tensor(GRADIENT), torch.tensor(CONSTRAINTS), margin)
    torch.testing.assert_close(found, torch.tensor(PROJECTED[margin]), rtol=1e-5, atol=1e-5)


def nearest(gradient: torch.Tensor, constraints: torch.Tensor) -> torch.Tensor:
    gradient, constraints = gradient.numpy(), constraints.numpy()
    found = minimize(
        lambda point: ((point - gradient) ** 2).sum() / 2,
        np.zeros_like(gradient),
        jac=lambda point: point - gradient,
        constraints=LinearConstraint(constraints, lb=0),
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    return torch.from_numpy(found.x)


def test_the_projected_gradient_is_the_nearest_that_satisfies_the_constraints():
    """Against a solver of the problem itself (eq. 8), not of its dual."""
    generator, projected = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        gradient, constraints = (torch.randn(*size, generator=generator).double() for size in ((8,), (4, 8)))
        found = project(gradient, 1e-3 * constraints)  # gradients of a trained network are small
        assert (constraints @ found >= -1e-9).all()
        projected += not torch.equal(found, gradient)
        torch.testing.assert_close(found, nearest(gradient, constraints), rtol=1e-5, atol=1e-6)
    assert projected > 10


def test_gem_with_tasks_of_one_gradient():
    """G G' has no inverse."""
    found = project(torch.tensor([-1.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)


def test_a_gem_takes_out_what_is_against_the_reference():
    """By hand: along = -2, |r|^2 = 4."""
    gradient, reference = torch.tensor([-1.0, 3.0]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(project_on_reference(gradient, reference), torch.tensor([0.0, 3.0]))
    assert project_on_reference(-gradient, reference) is not None
    torch.testing.assert_close(project_on_reference(-gradient, reference), -gradient)


@pytest.mark.parametrize("on", ["multi-head backbone", "l2p"])
def test_gems_steps_are_along_the_gradients_of_all_earlier_tasks(on, make_trainer, data):
    along, turned = [], []

    class Before(Strategy):
        def after_backward(self, trainer):
            self.gradients = [value.grad.clone() for value in trainer.model.parameters() if value.grad is not None]

    class After(Strategy):
        def after_backward(self, trainer):
            parameters = [value for value in trainer.model.parameters() if value.grad is not None]
            turned.append(any(not torch.equal(a, b.grad) for a, b in zip(before.gradients, parameters, strict=True)))
            gradient = torch.cat([value.grad.flatten() for value in parameters])
            for part in gem.store.parts:
                with kept_counts(trainer.tuner):
                    memory = gradient_of(trainer, parameters, own_batches(trainer, part))
                assert memory.any()
                along.append(float(F.cosine_similarity(memory, gradient, dim=0)))

    before, gem = Before(), GEM(12, margin=0.0)
    if on == "l2p":
        trainer = make_trainer(config_for(gem, "l2p"), strategy=[before, gem, After()], num_train_epochs=1)
    else:
        scenario = with_known_tasks(data, num_tasks=3)
        trainer = on_backbone(make_trainer, before, gem, After(), train_mask=True, scenario=scenario)
    trainer.train()
    assert np.bincount(gem.store.places[:, 0]).tolist() == [4, 4, 4]
    assert len(along) == 4 + 2 * 4 and min(along) > -1e-4
    assert not any(turned[:4]) and any(turned[4:])


def test_a_gems_step_is_along_the_reference(make_trainer):
    seen = []

    class Watched(AGEM):
        def projected(self, trainer, gradient, parameters):
            found = super().projected(trainer, gradient, parameters)
            seen.append((gradient, found))
            return found

    trainer = on_backbone(make_trainer, Watched(12, reference_batch_size=4), num_tasks=2)
    trainer.train()
    assert len(seen) == 6 and any(not torch.equal(before, after) for before, after in seen)
    assert all(after.norm() <= before.norm() * (1 + 1e-5) for before, after in seen)


# ------------------------------------------------------------------------------------------------------- DER++


def test_the_distance_of_logits_is_over_the_classes_there_were():
    kept = torch.tensor([[1.0, 2.0, torch.nan], [0.0, 0.0, 3.0]])
    logits = torch.tensor([[0.0, 2.0, 9.0], [1.0, 2.0, 3.0]], requires_grad=True)
    distance = logit_distance(logits, kept)
    assert distance.item() == pytest.approx(((1 + 0) / 2 + (1 + 4 + 0) / 3) / 2)
    distance.backward()
    assert logits.grad[0, 2] == 0
    assert widened(kept, 3, 4).isnan().sum() == 1 + 2 + 4 and widened(kept, 1, 1).shape == kept.shape


def test_der_keeps_the_logits_of_its_images(make_trainer):
    """Of a network that hardly moves, the kept logits are those that it gives for the images at the kept places."""
    der = DarkExperienceReplay(20)
    trainer = on_backbone(make_trainer, der, learning_rate=1e-12)
    trainer.train()
    assert der.store.seen == 96 and len(der.store) == 20 and set(der.store.places[:, 0]) == {0, 1, 2}
    assert der.logits.shape == (20, 6)
    trainer.model.eval()
    for (number, row), kept in zip(der.store.places.tolist(), der.logits, strict=True):
        known = 2 * (number + 1)
        assert kept[known:].isnan().all()
        (batch,) = trainer.plain_batches(trainer.scenario[number], rows=[row])
        with torch.no_grad():
            logits = trainer.model(pixel_values=batch["pixel_values"]).logits[0]
        torch.testing.assert_close(kept[:known], logits[:known], atol=1e-5, rtol=1e-5)
    terms = [entry["logit_replay"] for entry in trainer.state.log_history if "logit_replay" in entry]
    assert terms and max(terms) < 1e-8
    kept = trainer.strategy.kept_bytes(trainer)
    assert kept == {"memory": 20 * 3072, "logits of the memory": 4 * int((~der.logits.isnan()).sum())}


def test_ders_terms_are_of_the_batch_and_of_two_draws_from_the_memory(make_trainer):
    found = []

    class Watch(Strategy):
        def losses(self, trainer, inputs, logits):
            labels, logits = inputs["labels"], logits.detach()
            replayed = {"label_replay": 0.5 * F.cross_entropy(logits[16:], labels[16:])} if len(labels) > 8 else {}
            found.append({"own_loss": F.cross_entropy(logits[:8], labels[:8]), **replayed})
            if replayed:
                memory = der.store.labels(trainer, der.store.places).tolist()
                assert len(labels) == 24 and set(labels[8:].tolist()) <= set(memory)
            return {}

    der = DarkExperienceReplay(10)
    trainer = make_trainer(config_for(der, "l2p"), strategy=[Watch(), der], num_train_epochs=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "own_loss" in entry]
    assert len(found) == 12 and len(logs) == 4  # of the last task
    for entry, expected in zip(logs, found[-4:], strict=True):
        assert entry["logit_replay"] > 0
        for name, value in expected.items():
            assert entry[name] == pytest.approx(float(value), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- iCaRL

FEATURES = [
    [0.9, 0.09, -0.74],
    [-0.92, -0.46, 0.22],
    [-1.01, -0.21, -0.16],
    [0.54, 0.21, 0.36],
    [-0.65, -0.13, 0.78],
    [1.49, -1.26, 1.51],
    [1.35, 0.78, 0.26],
    [-0.31, 1.46, 1.96],
    [1.8, 1.32, 0.36],
]


def test_herding_chooses_as_avalanche_does():
    """Made by `HerdingSelectionStrategy.make_sorted_indices_from_features` of avalanche-lib 0.6.0."""
    order = [3, 4, 6, 1, 8, 2, 5, 7, 0]
    assert herd(torch.tensor(FEATURES), 20).tolist() == order
    assert herd(torch.tensor(FEATURES), 4).tolist() == order[:4]  # it may be cut from the end (Alg. 5)


def test_icarls_loss_is_avalanches():
    """Made by `ICaRLLossPlugin` of avalanche-lib 0.6.0, whose mean is over the 4 classes too."""
    logits = torch.tensor([[-1.21, 0.0, 0.66, -1.29], [0.4, 0.43, 0.7, -1.18], [-0.66, -0.44, -1.17, 1.74]])
    before = torch.tensor([[-0.5, 0.33], [1.32, 0.63], [0.68, 1.0]]).sigmoid()
    new = F.one_hot(torch.tensor([2, 3, 0]), 4)[:, 2:].float()
    found = sigmoid_loss(logits[:, 2:], new) + sigmoid_loss(logits[:, :2], before)
    assert found.item() == pytest.approx(4 * 0.80960613489151, rel=1e-6)


@pytest.mark.parametrize("on", ["backbone", "l2p"])
def test_icarl_classifies_by_the_nearest_mean_of_its_exemplars(on, make_trainer):
    icarl = ICaRL(15)
    if on == "backbone":
        trainer = on_backbone(make_trainer, icarl)
    else:
        trainer = make_trainer(config_for(icarl, "l2p"), strategy=icarl, num_train_epochs=1)
    for task, count in zip(trainer.scenario, (7, 3, 2), strict=True):
        before = icarl.store.places.tolist()
        trainer.train_task(task)
        labels = icarl.store.labels(trainer, icarl.store.places)
        assert np.bincount(labels).tolist() == [count] * 2 * (task.index + 1)
        assert all(place in before for place in icarl.store.places.tolist() if place[0] < task.index)
    head = trainer.tuner.head.active
    for label in range(6):
        chosen = icarl.store.places[labels == label]
        (batch,) = trainer.plain_batches(trainer.scenario[int(chosen[0, 0])], rows=chosen[:, 1].tolist())
        features, _ = trainer.tuner.features(batch["pixel_values"])
        mean = F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1)  # Alg. 1
        torch.testing.assert_close(head.weight[label] / head.scale, mean, atol=1e-5, rtol=1e-5)
    assert trainer.metrics["average_accuracy"] > 0.7


def test_icarl_begins_each_task_with_the_outputs_of_the_network_before(make_trainer):
    """Without a step in between, the distillation is the entropy of the old outputs: it has no gradient."""
    found = []

    class Watched(ICaRL):
        def losses(self, trainer, inputs, logits):
            terms = super().losses(trainer, inputs, logits)
            if terms:
                old = logits[:, : 2 * trainer.task.index].detach()
                gradient = torch.autograd.grad(terms["distillation"], logits, retain_graph=True)[0]
                found.append((terms["distillation"].item(), float(sigmoid_loss(old, old.sigmoid())), gradient))
            return terms

    trainer = on_backbone(make_trainer, Watched(12), max_steps=2)
    trainer.train()
    assert len(found) == 4
    for first, then in (found[:2], found[2:]):
        assert first[0] == pytest.approx(first[1], rel=1e-5) and first[2].abs().max() < 1e-6
        assert then[2].abs().max() > 1e-6


def test_icarl_trains_on_the_task_and_all_exemplars(make_trainer):
    seen = []

    class Watch(Strategy):
        def batch(self, trainer, inputs):
            seen.append((trainer.task.index, inputs["labels"].tolist()))
            return inputs

    on_backbone(make_trainer, ICaRL(12), Watch()).train()
    for task, exemplars in enumerate(([], [3] * 4, [3] * 4)):
        labels = np.bincount([label for number, batch in seen if number == task for label in batch], minlength=6)
        exemplars = {0: [], 1: [6, 6], 2: [3, 3, 3, 3]}[task]
        assert labels.tolist() == [*exemplars, 16, 16, *[0] * (4 - 2 * task)]


def test_icarl_is_measured_within_a_task_too(make_trainer):
    icarl = ICaRL(12)
    trainer = on_backbone(make_trainer, icarl, eval_strategy="steps", eval_steps=2)
    trainer.train()
    within = [
        entry["eval_average_accuracy"] for entry in trainer.state.log_history if "eval_average_accuracy" in entry
    ]
    assert within and trainer.finished_tasks == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "linear", "head_options": {}}, "head is 'linear' .* Set head='ncm', head_options="),
        ({"head_options": {"metric": "cosine"}}, "classifies by the nearest mean of exemplars"),
        ({"head_features": "cls+mean"}, "head_features='cls\\+mean', but iCaRL"),
        ({"train_mask": True}, "train_mask is True, but iCaRL trains on classes of earlier tasks"),
    ],
)
def test_icarl_refuses_other_heads(settings, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(config_for(ICaRL(), **settings), strategy=ICaRL())


def test_icarl_refuses_what_it_has_no_exemplars_for(make_trainer, data):
    with pytest.raises(ValueError, match="memory_size is 5, but must be at least the number of classes, 6"):
        make_trainer(config_for(ICaRL()), strategy=ICaRL(5))
    domains = {split: part.add_column("domain", [0, 1] * (len(part) // 2)) for split, part in data.items()}
    again = domain_incremental(domains)
    with pytest.raises(ValueError, match="brings classes again in later tasks, but iCaRL"):
        make_trainer(config_for(ICaRL()), strategy=ICaRL(), scenario=again)
    trainer = make_trainer(config_for(ICaRL()), num_train_epochs=1)
    trainer.train_task(trainer.scenario[0])
    with pytest.raises(ValueError, match="has learnt 1 tasks, of whose classes iCaRL has no exemplars"):
        make_trainer(None, model=trainer.model, strategy=ICaRL(), folder="more")
    coda = CodaPromptConfig(layers=[0, 1], train_mask=False, **EXEMPLARS)
    with pytest.raises(ValueError, match="The adapter is CODA-Prompt, but iCaRL"):
        make_trainer(coda, strategy=ICaRL())


def test_a_computed_head_on_a_trained_backbone_needs_exemplars(make_trainer):
    with pytest.raises(ValueError, match="Fine-tuning changes all features with each task"):
        make_trainer(config_for(ICaRL()), strategy=FineTuning())
    with pytest.raises(ValueError, match="EWC holds weights"):
        make_trainer(config_for(ICaRL()), strategy=[FineTuning(), ICaRL(), EWC()])


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["DER++", "iCaRL", "ER"])
def test_what_a_plain_run_forgets_is_kept(name, make_trainer):
    plain = make_trainer(config_for(GEM()), strategy=FineTuning(), learning_rate=1e-3, folder="plain")
    plain.train()
    trainer = on_backbone(make_trainer, STRATEGIES[name](), num_train_epochs=2)
    trainer.train()
    assert trainer.metrics["average_accuracy"] > plain.metrics["average_accuracy"] + 0.1
    assert trainer.results.method == f"Fine-tuning + {name}"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_begins_anew_with_a_new_run(name, make_trainer):
    found, strategy = [], STRATEGIES[name]()
    for folder in ("first", "second"):
        trainer = on_backbone(make_trainer, strategy, folder=folder, num_tasks=2)
        trainer.train()
        found.append(weights_of(trainer))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.tuner.model.state_dict().items()}


class Interrupt(TrainerCallback):
    """After the checkpoint of a step, in the last task."""

    def __init__(self, step: int):
        self.step, self.trainer = step, None

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.task.index == 1 and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "name",
    [name if name in ("GEM", "DER++", "iCaRL") else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES],
)
def test_a_resumed_run_is_the_whole_one_to_the_bit(name, make_trainer):
    """Interrupted after the first task, and in the middle of the second, after a checkpoint."""

    def make(folder="run", **more):
        settings = {"num_tasks": 2, "save_strategy": "steps", "save_steps": 2}
        return on_backbone(make_trainer, STRATEGIES[name](), folder=folder, **settings, **more)

    whole, again = whole_and_resumed(make)
    interrupt = Interrupt(2)
    part = make("middle", callbacks=[interrupt])
    interrupt.trainer = part
    with pytest.raises(KeyboardInterrupt):
        part.train()
    middle = make("middle")
    middle.train(resume_from_checkpoint=True)
    assert middle.finished_tasks == 2
    for other in (again, middle):
        found = weights_of(other)
        assert all(torch.equal(value, found[key]) for key, value in weights_of(whole).items())
        np.testing.assert_array_equal(other.accuracy_matrix, whole.accuracy_matrix)
        states = [each.strategy.strategies[1].state_dict() for each in (other, whole)]
        assert states[0].keys() == states[1].keys() and states[0]["seen"] == states[1]["seen"]
        for key in states[0].keys() - {"seen"}:
            torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "probe+finetuning+balanced+uneven",
        "l2p+gem+uneven",
        "probe+finetuning+gem",
        "probe+finetuning+agem",
        "l2p+der+uneven",
        "probe+finetuning+der",
        "l2p+icarl+uneven",
    ],
)
def test_two_processes_equal_one(method, tmp_path):
    for processes, folder in ((1, "one"), (2, "two")):
        run(processes, tmp_path / folder, method, PLAIN="1", EVALUATE_FIRST="1")
    check_same(tmp_path / "two", tmp_path / "one", 1e-4, 1e-3)


@pytest.mark.parametrize("name", STRATEGIES)
def test_streams_are_refused(name, make_trainer, data):
    strategy = STRATEGIES[name]()
    config = config_for(strategy)
    stream = {"num_train_epochs": 1, "lr_scheduler_type": "constant"}
    with pytest.raises(ValueError, match=f"{name.replace('+', '.')} needs tasks with an end"):
        make_trainer(config, strategy=strategy, scenario=task_free(data, 3), **stream)


@pytest.mark.parametrize("kind", [ExperienceReplay, GEM, AGEM, DarkExperienceReplay, ICaRL])
@pytest.mark.parametrize("size", [0, -1, 2.5, True, "9"])
def test_a_memory_of_no_size_is_refused(kind, size):
    with pytest.raises(ValueError, match="memory_size is .*, but must be a whole number of at least 1. Give one such"):
        kind(size)


@pytest.mark.parametrize("value", [-1, "1", True, float("nan"), float("inf")])
def test_other_bad_settings_are_refused(value):
    for name, make in (("margin", GEM), ("alpha", DarkExperienceReplay), ("beta", DarkExperienceReplay)):
        with pytest.raises(ValueError, match=f"{name} is .*, but must be a number of at least 0. Give one such"):
            make(**{name: value})
    with pytest.raises(ValueError, match="reference_batch_size is 0, but must be a whole number of at least 1"):
        AGEM(reference_batch_size=0)
    with pytest.raises(ValueError, match="memory is 'ring', but must be one of 'reservoir', 'balanced'"):
        ExperienceReplay(memory="ring")


def test_settings_are_numbers_that_json_knows():
    assert ExperienceReplay(np.int64(5)).settings() == {"memory_size": 5, "replay_batch_size": None}
    assert ExperienceReplay(5, memory="balanced").settings()["memory"] == "balanced"
    assert GEM(np.int64(5), np.float32(1)).settings() == {"memory_size": 5, "margin": 1.0}
    assert AGEM(5, 3).settings() == {"memory_size": 5, "reference_batch_size": 3}
    assert DarkExperienceReplay(5).settings() == {"memory_size": 5, "alpha": 0.1, "beta": 0.5}


def test_what_der_cannot_be_combined_with(make_trainer):
    config = config_for(DarkExperienceReplay())
    with pytest.raises(ValueError, match=r"DER\+\+ and ER cannot be combined: each puts images"):
        make_trainer(config, strategy=[DarkExperienceReplay(), ExperienceReplay()])
    with pytest.raises(ValueError, match="loss is given, but DER.. has a loss of its own"):
        make_trainer(config, strategy=DarkExperienceReplay(), loss=F.cross_entropy)
    with pytest.raises(ValueError, match="train_mask is True, but DER.. trains on classes of earlier tasks"):
        make_trainer(L2PConfig(), strategy=DarkExperienceReplay())
    with pytest.raises(ValueError, match="DER.. keeps logits of a head that is trained"):
        make_trainer(LinearProbeConfig(head="ncm", train_mask=False), strategy=DarkExperienceReplay())
