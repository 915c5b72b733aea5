"""A class that was forgotten leaves no trace: digests of all files against a model that never saw it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from joining_cases import BY_CLASS, answers, learnt_apart
from peft import PeftModel, get_peft_model
from tuner_cases import CASES, config, images, tiny

from peft_cl.heads.files import SUMS_FILE


#: PEFT looks for short names of adapters in the names of its methods.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter name")


TASKS = ([0, 1], [2, 3, 4], [5])
HEADS = {
    "ncm": {"head": "ncm"},
    "ncm, cosine": {"head": "ncm", "head_options": {"metric": "cosine"}, "head_features": "cls+mean"},
    "lda": BY_CLASS,
    "kernel lda": {"head": "lda", "head_options": {"fourier": 20, "by_class": True}},
    "ridge": {"head": "ridge", "head_options": {"by_class": True}},
    "ranpac": {"head": "ridge", "head_options": {"projection": 30, "by_class": True}},
}


def name_of(label: int) -> str:
    return f"secret {label}"


def taught(settings: dict, without: set[int] = frozenset()) -> PeftModel:
    """An adapter on frozen features that has seen the classes of all tasks but some, each image alone: a batch of
    other images rounds otherwise."""
    model = get_peft_model(tiny(), config("linear-probe", **settings))
    for labels in TASKS:
        labels = [label for label in labels if label not in without]
        if labels:
            model.begin_task([name_of(label) for label in labels])
            for label in labels:
                row = torch.tensor([model.peft_config["default"].classes.index(name_of(label))])
                for image in images(4, seed=label):
                    model.observe(image[None], row)
            model.fit_head()
    return model


def digests(model: PeftModel, folder: Path) -> dict[str, str]:
    model.save_pretrained(folder)
    model.save_sums(folder)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("forgotten", [{3}, {0, 4}, {5}, {2, 3, 4}], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_every_file_is_that_of_a_model_that_never_saw_it(head, forgotten, tmp_path):
    model = taught(HEADS[head])
    model.forget_classes([name_of(label) for label in forgotten])
    never = taught(HEADS[head], forgotten)
    found, expected = digests(model, tmp_path / "forgets"), digests(never, tmp_path / "never")
    assert found == expected and {SUMS_FILE, "adapter_model.safetensors", "adapter_config.json"} <= found.keys()
    assert torch.equal(answers(model, "default"), answers(never, "default"))
    written = b"".join(file.read_bytes() for file in (tmp_path / "forgets").iterdir())
    assert not any(name_of(label).encode() in written for label in forgotten)


def test_sums_beside_a_loaded_adapter_forget_too(tmp_path):
    digests(taught(BY_CLASS), tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "saved", is_trainable=True)
    loaded.forget_classes([name_of(5)])
    assert digests(loaded, tmp_path / "forgets") == digests(taught(BY_CLASS, {5}), tmp_path / "never")


@pytest.mark.parametrize("case", ["l2p", "dualprompt", "dualprompt-coda", "coda", "coda-shared"])
def test_a_task_that_is_empty_goes_with_the_rows_that_it_brought(case, tmp_path):
    model = learnt_apart(case, [(0, 1, 2)], **({"task_evidence": 1.0} if CASES[case][1] != "textbook" else {}))
    before = model.base_model.encoder.entries["a"]
    own, rows = model.peft_config["a"].rows_per_task, {name: before.rows(name).clone() for name in before.row_axes}
    with pytest.warns(UserWarning, match="Only an adapter without prompts forgets altogether"):
        model.forget_classes([f"class {row}" for row in (3, 4, 5)])
    facts, pool = model.peft_config["a"], model.base_model.pool
    assert facts.tasks == [[0, 1, 2], [3, 4, 5]] and "class 4" not in facts.classes
    for name, axis in pool.row_axes.items():
        count = rows[name].shape[axis]
        kept = range(count) if own is None else [*range(own), *range(2 * own, 3 * own)]
        assert torch.equal(pool.rows(name), rows[name].index_select(axis, torch.tensor(kept)))
    evidence = model.base_model.head.active.evidence
    assert evidence is None or len(evidence.task_queries) == 2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a", "a", is_trainable=True)
    assert torch.equal(answers(loaded, "a"), answers(model, "a"))
    model.begin_task(["new"])
    assert answers(model, "a").shape == (4, 7)
    assert all(value.requires_grad for _, value in pool.named_parameters())


def test_sums_in_which_classes_are_not_apart_are_refused_and_nothing_is_lost():
    model = taught({"head": "lda"})
    before = answers(model, "default")
    with pytest.raises(ValueError, match="by_class"):
        model.forget_classes([name_of(3)])
    assert torch.equal(answers(model, "default"), before) and model.peft_config["default"].num_tasks == 3
