"""Tasks taken out of an adapter into one of their own, on the shell too."""

from __future__ import annotations

import warnings

import pytest
import torch
from joining_cases import BY_CLASS, FUSION, LDA, answers, learn, learnt_apart
from observing_cases import check_close
from peft import PeftModel
from tuner_cases import images, task_names, tiny

from peft_cl import join_adapters, split_adapter


#: PEFT looks for short names of adapters in the names of its methods.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter name")


@pytest.mark.parametrize("case", ["l2p", "l2p-deep", "dualprompt", "dualprompt-coda", "coda", "linear-probe"])
def test_what_was_joined_comes_apart_again(case):
    model = learnt_apart(case)
    join_adapters(model, ["a", "b"], "ab")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the other adapter is left
        for name, tasks in (("a", [0, 1]), ("b", [3, 2])):
            split_adapter(model, "ab", tasks, f"{name} again")
            assert torch.equal(answers(model, f"{name} again"), answers(model, name))
            ours, theirs = (model.peft_config[each] for each in (name, f"{name} again"))
            assert (ours.classes, ours.tasks, ours.rows_in_use) == (theirs.classes, theirs.tasks, theirs.rows_in_use)
            assert getattr(theirs, "joined", None) is None


@pytest.mark.parametrize("settings", [{"head": "ncm"}, BY_CLASS], ids=["ncm", "lda by class"])
def test_statistics_of_the_tasks_are_those_of_an_adapter_that_saw_no_others(settings):
    model = learnt_apart("linear-probe", [(0, 1, 2), (2, 0)], **settings)
    split_adapter(model, "a", [2, 0], "part")
    assert model.peft_config["part"].classes == task_names(0) + task_names(2)
    order = [model.peft_config["b"].classes.index(name) for name in model.peft_config["part"].classes]
    check_close(answers(model, "part"), answers(model, "b")[:, order])
    learn(model, "part", [3])
    assert answers(model, "part").shape == (4, 9)


@pytest.mark.parametrize("case", ["linear-probe", "dualprompt"])
def test_sums_of_all_classes_together_are_left_behind_with_a_warning(case, tmp_path):
    model = learnt_apart(case, [(0, 1, 2)], **LDA)
    with pytest.warns(UserWarning, match="predicts but cannot learn on"):
        split_adapter(model, "a", [1], "part")
    if case == "linear-probe":
        whole = answers(model, "a")[:, 3:6]
        torch.testing.assert_close(answers(model, "part"), whole)
    model.set_adapter("part")
    model.save_pretrained(tmp_path, selected_adapters=["part"])
    assert model.save_sums(tmp_path / "part") is None
    with pytest.raises(ValueError, match="needs them, but there is no head_sums"):
        learn(model, "part", [3])
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "part", "part")
    assert torch.equal(answers(loaded, "part"), answers(model, "part"))


def test_sums_that_lie_beside_the_adapter_are_found(tmp_path):
    model = learnt_apart("linear-probe", [(0, 1)], head="ncm")
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    model.save_sums(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a", "a")
    split_adapter(loaded, "a", [1], "part")
    learn(loaded, "part", [2])
    assert answers(loaded, "part").shape == (4, 6)


@pytest.mark.parametrize(
    ("case", "settings", "rows"),
    [
        ("dualprompt", {}, 2),
        ("coda", {}, 4),
        ("l2p", {"use_prompt_mask": True, "pool_size": 8}, 4),
        ("l2p", {}, 6),
        ("coda", FUSION, 2),
        ("dualprompt-general", {}, 0),
    ],
)
def test_rows_of_the_pool_go_with_their_tasks_or_all_of_them_come(case, settings, rows, tmp_path):
    model = learnt_apart(case, [(0, 1, 2)], task_evidence=0.0 if settings is FUSION else 1.0, **settings)
    with pytest.warns(UserWarning, match="prompts of 'a' were learnt with images of other tasks too"):
        split_adapter(model, "a", [0, 2], "part")
    pool, whole = (model.base_model.encoder.entries[name] for name in ("part", "a"))
    assert pool.rows_in_use == rows == model.peft_config["part"].rows_in_use
    own = model.peft_config["a"].rows_per_task
    if own and settings is not FUSION:
        places = torch.tensor([task * own + place for task in (0, 2) for place in range(own)])
        for name, axis in pool.row_axes.items():
            taken = pool.rows(name).narrow(axis, 0, rows)
            assert torch.equal(taken, whole.rows(name).index_select(axis, places))
    model.save_pretrained(tmp_path, selected_adapters=["part"])
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "part", "part", is_trainable=True)
    assert torch.equal(answers(loaded, "part"), answers(model, "part"))


def test_bad_tasks_are_refused():
    model = learnt_apart("coda", [(0, 1)])
    for tasks in ([], [2], [-1], [0, 0], "0", None, [True], 1.0):
        with pytest.raises(ValueError, match="tasks is .*, but must hold numbers of the adapter's tasks, from 0 to 1"):
            split_adapter(model, "a", tasks, "new")
    for names, message in ((("no", "new"), "'no'.* is no adapter"), (("a", "a"), "has an adapter 'a' already")):
        with pytest.raises(ValueError, match=message):
            split_adapter(model, names[0], [0], names[1])
    assert list(model.peft_config) == ["a"]
    assert answers(model, "a", images(2)).shape == (2, 6)
