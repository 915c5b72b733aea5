"""Task evidence: what the mean queries of the tasks add to the logits in evaluation, and only there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from tuner_cases import METHODS, begin, config, images, logits, prompted, step, task_names, tiny

from peft_cl import CodaPromptConfig, L2PConfig


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
    assert not [key for key in prompted(name).state_dict() if "task_queries" in key]


@pytest.mark.parametrize("name", METHODS)
def test_it_is_saved_and_grows_on_after_loading(name, tmp_path):
    model, means = learnt(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    loaded.begin_task(task_names(2))
    kept = loaded.base_model.head.active.task_queries
    assert kept.shape[0] == 3 and not kept[2].any()
    torch.testing.assert_close(F.normalize(kept[0], dim=0), F.normalize(means[0], dim=0))


def test_classes_of_all_tasks_are_not_told_apart():
    model = prompted("coda", tasks=0, task_evidence=WEIGHT)
    for _ in range(2):
        model.begin_task(task_names(0))
        step(model)
    model.eval()
    answer = logits(model)
    model.peft_config["default"].task_evidence = 0.0
    difference = answer - logits(model)
    torch.testing.assert_close(difference, difference[:, :1].expand(-1, 3), rtol=0, atol=1e-5)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="task_evidence is -1, but must be a number of at least 0"):
        L2PConfig(task_evidence=-1)
    with pytest.raises(ValueError, match="task_evidence is 2.0, but it compares the query of the query pass"):
        CodaPromptConfig(query_source="layer_cls", task_evidence=2.0)
