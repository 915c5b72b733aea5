"""Task evidence: what the mean queries of the tasks add to the logits in evaluation, and only there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from tuner_cases import METHODS, begin, config, images, logits, prompted, step, task_names, tiny

from peft_cl import CodaPromptConfig, L2PConfig
from peft_cl.heads import TaskEvidence


WEIGHT = 5.0


def learnt(name: str, **overrides) -> tuple[PeftModel, list[torch.Tensor]]:
    """A model after two tasks of two equal steps each, and the mean unit query of both tasks."""
    model = prompted(name, tasks=0, task_evidence=WEIGHT, **overrides)
    means = []
    for task in range(2):
        begin(model, task)
        # The second task looks at the images upside down, so that its mean query is another one.
        batch = images().flip(2) if task else images()
        model.train()
        for _ in range(2):
            model(pixel_values=batch, labels=torch.tensor([3 * task, 3 * task + 1, 3 * task + 2, 3 * task]))
        means.append(F.normalize(model.base_model.query(batch), dim=-1).mean(0))
    return model.eval(), means


@pytest.mark.parametrize("given", [False, True], ids=["own-query", "given-query"])
@pytest.mark.parametrize("name", METHODS)
def test_each_class_gets_its_tasks_cosine(name, given):
    model, means = learnt(name)
    batch = images(5, seed=1)
    query = model.base_model.query(batch)
    answer = logits(model, batch, **({"query": query} if given else {}))
    model.peft_config["default"].task_evidence = 0.0
    plain = logits(model, batch)
    expected = torch.stack([WEIGHT * F.cosine_similarity(query, mean[None]) for mean in means], dim=1)
    torch.testing.assert_close(answer - plain, expected.repeat_interleave(3, dim=1), rtol=1e-4, atol=1e-4)
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.01  # the two tasks can be told apart


@pytest.mark.parametrize("name", METHODS)
def test_training_is_the_same_without_it(name):
    with_it, without = (prompted(name, task_evidence=weight) for weight in (WEIGHT, 0.0))
    torch.testing.assert_close(step(with_it), step(without), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_off_by_default_and_keeps_nothing(name):
    assert config(name).task_evidence == 0
    assert not [key for key in prompted(name).state_dict() if "evidence" in key]


@pytest.mark.parametrize("name", METHODS)
def test_it_is_saved_and_grows_on_after_loading(name, tmp_path):
    model, means = learnt(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    loaded.begin_task(task_names(2))
    kept = loaded.base_model.head.active.evidence.task_queries
    assert kept.shape[0] == 3 and not kept[2].any()
    torch.testing.assert_close(kept[:2], torch.stack(means))


def evidence_of(tasks: list[list[int]], means: list[list[float]], **fields) -> TaskEvidence:
    settings = config("linear-probe", task_evidence=WEIGHT, **fields)
    settings.tasks, settings.classes = tasks, [str(row) for row in range(max(map(max, tasks)) + 1)]
    evidence = TaskEvidence(2, settings)
    for row, mean in enumerate(means):
        evidence.task_queries[row], evidence.task_counts[row] = torch.tensor(mean), 1
    return evidence


EAST, NORTH = [1.0, 0.0], [0.0, 1.0]
QUERY = torch.tensor([[3.0, 4.0]])  # cosines 0.6 and 0.8


def answer(tasks) -> torch.Tensor:
    rows = torch.tensor([[number in members for number in range(3)] for members in tasks])
    return evidence_of(tasks, [EAST, NORTH])(QUERY, rows)


def test_a_class_of_several_tasks_joins_their_terms():
    found = answer([[0, 1], [1, 2]])
    both = math.log(math.exp(WEIGHT * 0.6) + math.exp(WEIGHT * 0.8))
    torch.testing.assert_close(found, torch.tensor([[WEIGHT * 0.6, both, WEIGHT * 0.8]]))


def test_a_task_not_learnt_yet_is_neither_preferred_nor_put_back():
    found = answer([[0], [1], [2]])
    torch.testing.assert_close(found, WEIGHT * torch.tensor([[0.6, 0.8, 0.7]]))


def test_the_mean_is_of_all_finite_queries():
    evidence = evidence_of([[0]], [])
    evidence.observe(torch.tensor([[5.0, 0.0], [0.0, 2.0], [math.nan, 1.0]]))
    evidence.observe(torch.tensor([[0.0, 7.0], [math.inf, 0.0]]))
    torch.testing.assert_close(evidence.task_queries, torch.tensor([[1 / 3, 2 / 3]]))
    assert evidence.task_counts.tolist() == [3]


def test_half_precision_keeps_a_long_tasks_mean():
    evidence = evidence_of([[0]], []).half()
    for _ in range(1500):
        evidence.observe(torch.tensor([EAST, NORTH] * 32))
    torch.testing.assert_close(evidence.task_queries.float(), torch.tensor([[0.5, 0.5]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("circumstance", ["no labels", "no gradient", "evaluation"])
def test_only_training_steps_are_observed(circumstance):
    model, _ = learnt("coda")
    before = logits(model)
    model.train(circumstance != "evaluation")
    with torch.set_grad_enabled(circumstance != "no gradient"):
        given = {} if circumstance == "no labels" else {"labels": torch.tensor([3, 4, 5, 3])}
        model(pixel_values=images(seed=9), **given)
    torch.testing.assert_close(logits(model.eval()), before, rtol=0, atol=0)


def test_a_known_task_needs_no_evidence():
    model, _ = learnt("coda")
    with_it = logits(model, task_ids=torch.tensor([0, 1, 0, 1]))
    model.peft_config["default"].task_evidence = 0.0
    torch.testing.assert_close(logits(model, task_ids=torch.tensor([0, 1, 0, 1])), with_it, rtol=0, atol=0)


def test_autocast_leaves_it_in_float32():
    model, means = learnt("linear-probe")
    query = model.base_model.query(images())
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, query=query)
        model.peft_config["default"].task_evidence = 0.0
        plain = logits(model, query=query)
    expected = torch.stack([WEIGHT * F.cosine_similarity(query, mean[None]) for mean in means], dim=1)
    torch.testing.assert_close(found - plain.float(), expected.repeat_interleave(3, dim=1), rtol=1e-5, atol=1e-5)


def test_the_weight_may_be_changed_and_switched_off_between_tasks():
    model, means = learnt("coda")
    model.peft_config["default"].task_evidence = 0.0
    begin(model, 2)
    step(model)
    model.peft_config["default"].task_evidence = 2 * WEIGHT
    kept = model.base_model.head.active.evidence
    torch.testing.assert_close(kept.task_queries[:2], torch.stack(means))
    assert kept.task_counts.tolist() == [8, 8, 4] and logits(model.eval()).shape == (4, 9)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="task_evidence is -1, but must be a number of at least 0"):
        L2PConfig(task_evidence=-1)
    with pytest.raises(ValueError, match="task_evidence is inf, but must be a number of at least 0"):
        L2PConfig(task_evidence=math.inf)
    with pytest.raises(ValueError, match="task_evidence is 2.0, but it compares the query of the query pass"):
        CodaPromptConfig(query_source="layer_cls", task_evidence=2.0)
    model = prompted("coda")
    model.peft_config["default"].task_evidence = 1.0
    with pytest.raises(ValueError, match="task_evidence was set to 1.0, but the adapter was made without it"):
        logits(model)
