"""Facts of adapters, records and snapshots that no run writes are refused, whichever way they are read."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tuner_cases import METHODS, prompted, tiny

from peft_cl import CodaPromptConfig, L2PConfig, LinearProbeConfig, RunResults
from peft_cl.cli import main
from peft_cl.text import brief
from peft_cl.trainer.snapshot import load_snapshot, save_snapshot


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

FACTS = {
    "tasks negative": {"tasks": [[0, -1, 2], [3, 4, 5]]},
    "tasks flat": {"tasks": [0, 1, 2]},
    "tasks text": {"tasks": "012345"},
    "tasks incomplete": {"tasks": [[0, 1, 2], [3, 4]]},
    "tasks beyond": {"tasks": [[0, 1, 2], [3, 4, 6]]},
    "tasks swapped": {"tasks": [[3, 4, 5], [0, 1, 2]]},
    "tasks repeated": {"tasks": [[0, 1, 1, 2], [3, 4, 5]]},
    "tasks floating": {"tasks": [[0.0, 1.0, 2.0], [3, 4, 5]]},
    "tasks missing": {"tasks": None},
    "a task too few": {"tasks": [[0, 1, 2, 3, 4, 5]]},
    "a task too many": {"tasks": [[0, 1], [2, 3], [4, 5]]},
    "classes repeated": {"classes": ["a", "b", "c", "d", "e", "a"]},
    "classes numbers": {"classes": [0, 1, 2, 3, 4, 5]},
    "classes too few": {"classes": ["a", "b", "c", "d", "e"]},
    "classes a text": {"classes": "abcdef"},
    "classes null": {"classes": None},
    "rows negative": {"rows_in_use": -1},
    "rows text": {"rows_in_use": "4"},
    "rows other": {"rows_in_use": 77},
    "stream": {"stream": True},
    "evidence": {"task_evidence": 1e308},
    "evidence NaN": {"task_evidence": float("nan")},
    "head": {"head": ["linear"]},
    "head options": {"head_options": [1]},
    "features": {"head_features": 7},
    "format": {"format_version": "2"},
    "digests": {"base_weights": ["x"]},
    "base": {"base_model_name_or_path": {"a": 1}},
    "type": {"peft_type": ["L2P"]},
    "layers": {"layers": [[0]]},
    "length": {"prompt_length": 10**30},
}


def damage(folder, **facts):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **facts}))


@pytest.mark.parametrize("kind", FACTS)
def test_facts_that_no_task_writes_are_refused(kind, tmp_path, capsys):
    prompted("coda").save_pretrained(tmp_path)
    damage(tmp_path, **FACTS[kind])
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        PeftModel.from_pretrained(tiny(), tmp_path)
    assert len(str(caught.value)) < 2000
    if kind not in ("tasks missing", "a task too few", "a task too many", "classes null", "rows other", "length"):
        with pytest.raises((ValueError, TypeError, KeyError)):
            PeftConfig.from_pretrained(tmp_path)
        assert main(["info", str(tmp_path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", METHODS)
def test_sizes_are_compared_with_the_file_before_they_are_made(name, tmp_path):
    """Each of these would take gigabytes, or the machine."""
    prompted(name).save_pretrained(tmp_path)
    sizes = {
        "l2p": ["pool_size", "prompt_length"],
        "coda": ["components_per_task", "prompt_length"],
        "dualprompt": ["prompt_length", "g_prompt_length"],
        "linear-probe": [],
    }
    for field in sizes[name]:
        good = (tmp_path / CONFIG).read_text()
        damage(tmp_path, **{field: 10**8})
        with pytest.raises(ValueError, match="does not fit this model|cannot be orthogonal"):
            PeftModel.from_pretrained(tiny(), tmp_path)
        (tmp_path / CONFIG).write_text(good)
    names = [f"class {index}" for index in range(300_000)]
    damage(tmp_path, classes=names, tasks=[list(range(150_000)), list(range(150_000, 300_000))])
    with pytest.raises(ValueError, match=r"head.weight: file \(6, 24\), model \(300000, 24\)") as caught:
        PeftModel.from_pretrained(tiny(), tmp_path)
    assert len(str(caught.value)) < 3000


def test_a_projection_is_not_drawn_before_the_sizes_are_compared(tmp_path):
    for head, options in (("lda", {"fourier": 10**8}), ("ridge", {"projection": 10**8})):
        model = get_peft_model(tiny(), LinearProbeConfig(head=head))
        model.begin_task(["a", "b"])
        model.save_pretrained(tmp_path / head)
        damage(tmp_path / head, head_options=options)
        with pytest.raises(ValueError, match=r"head.weight: file \(2, 24\), model \(2, 1000000"):
            PeftModel.from_pretrained(tiny(), tmp_path / head)
    with pytest.raises(ValueError, match="fourier is .* at most 1,000,000,000"):
        LinearProbeConfig(head="lda", head_options={"fourier": 10**10})


def test_a_loaded_configuration_may_be_changed_for_a_new_adapter(tmp_path):
    prompted("l2p").save_pretrained(tmp_path)
    settings = L2PConfig.from_pretrained(tmp_path)
    settings.pool_size, settings.classes, settings.tasks, settings.inference_mode = 9, None, None, False
    model = get_peft_model(tiny(), settings)
    model.begin_task(["a"])
    assert model.base_model.pool.prompts.shape[1] == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_are_none_are_refused(name, value, tmp_path):
    prompted(name).save_pretrained(tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    for key, tensor in good.items():
        if tensor.numel():
            spoilt = tensor.clone()
            spoilt.view(-1)[-1] = value
            save_file({**good, key: spoilt}, tmp_path / WEIGHTS)
            with pytest.raises(ValueError, match="not finite .*Every prediction would be a guess"):
                PeftModel.from_pretrained(tiny(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_other_kinds_of_number_are_refused(dtype, tmp_path):
    prompted("coda").save_pretrained(tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    save_file({key: value.to(dtype) for key, value in good.items()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="numbers of another kind"):
        PeftModel.from_pretrained(tiny(), tmp_path)
    for floating in (torch.float16, torch.bfloat16, torch.float64):
        save_file({key: value.to(floating) for key, value in good.items()}, tmp_path / WEIGHTS)
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_classes_that_come_twice_in_the_base_model_are_its_own(tmp_path):
    base = tiny()
    base.config.id2label = dict.fromkeys(range(12), "crane")
    get_peft_model(base, CodaPromptConfig(layers=[0], components_per_task=2)).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).classes == ["crane"] * 12


# ----------------------------------------------------------------------------------------------- records

RECORDS = {
    "accuracy_matrix": ([[5.0, None], [-1, 0.5]], [["a", "b"], ["c", "d"]], "x", [[float("inf"), 0], [0, 0]], None),
    "metrics": ({"average_accuracy": 5}, {"average_accuracy": "high"}, [1], {"forgetting": -7}),
    "test_sizes": ([1.5, 2], [-1, 3], "ab", [True, 1]),
    "task_names": ([1, 2], "ab", ["x" * 10**6, "b"], None),
    "method": (None, 3, ["l2p"], "x" * 10**6),
    "seed": ("1", 1.5, None),
    "train_seconds": (-1, float("inf"), "1 s"),
    "finished_tasks": (-1, 3, "2", True, 1.0),
    "total_parameters": (-1, 1.5),
    "adapter_bytes": ("1", -1),
    "per_class_accuracy": ({"a": 2}, [0.5], {"a": "x"}),
    "task_identification": (2, "x"),
    "baseline": ([0.1], [2, 2], "ab"),
    "prompt_usage": ([[-1], [1]], [["a"], ["b"]], "x"),
    "own_metrics": (
        "x",
        [1],
        {"f1": 0.5},
        {"f1": [0.5]},
        {"f1": [0.5, "x"]},
        {"f1": [True, 0.5]},
        {"x" * 10**6: [1, 2]},
    ),
    "hyperparameters": ([1], "x"),
    "scenario": ("class-incremental", None),
    "versions": ([], "x"),
    "format_version": ("1", None, [1] * 10**5),
}


@pytest.mark.parametrize("field", RECORDS)
def test_records_that_no_run_writes_are_refused(field, trained, tmp_path, capsys):
    good = json.loads((trained / "results.json").read_text())
    for name in (CONFIG, WEIGHTS):
        shutil.copy(trained / name, tmp_path / name)
    for value in RECORDS[field]:
        (tmp_path / "results.json").write_text(json.dumps({**good, field: value}))
        with pytest.raises(ValueError) as caught:
            RunResults.load(tmp_path)
        assert len(str(caught.value)) < 2000, value
    assert main(["info", str(tmp_path)]) == 2 and main(["plot", str(tmp_path)]) == 2
    capsys.readouterr()


def test_a_file_of_impossible_size_is_not_read(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for name in ("results.json", CONFIG):
        with open(tmp_path / "run" / name, "r+b") as file:
            file.truncate(10**12)  # takes no room on the disk
    with pytest.raises(ValueError, match="has 1,000,000,000,000 bytes"):
        RunResults.load(tmp_path / "run")
    with pytest.raises(ValueError, match="has 1,000,000,000,000 bytes"):
        L2PConfig.from_pretrained(tmp_path / "run")
    assert main(["info", str(tmp_path / "run")]) == 2


def test_what_is_shown_is_short():
    deep = ["x"]
    for _ in range(40):
        deep = [deep, deep]
    for value in ("x" * 10**7, list(range(10**6)), {index: index for index in range(10**5)}, deep, 10**5000):
        assert len(brief(value)) < 10_000
    assert brief([1, "a", None]) == "[1, 'a', None]"


# ----------------------------------------------------------------------------------------------- snapshots


def whole(folder, content: bytes):
    """Any bytes under a right digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sequence.pt").write_bytes(hashlib.sha256(content).digest() + content)


def test_junk_under_a_right_digest_is_refused(tmp_path):
    save_snapshot(tmp_path, {"task": 1})
    good = (tmp_path / "sequence.pt").read_bytes()[32:]
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as parts, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in parts.namelist():
            target.writestr(name, parts.read(name))
    other = io.BytesIO()
    torch.save([1, 2], other)
    for content in (b"", b"junk", good[:100], packed.getvalue(), other.getvalue(), b"PK\x03\x04" + bytes(100)):
        whole(tmp_path, content)
        with pytest.raises(ValueError, match="is no snapshot of a run"):
            load_snapshot(tmp_path)


def test_a_snapshot_that_no_run_wrote_is_refused(make_trainer, tmp_path):
    words = {"num_tasks": 2, "num_train_epochs": 1}
    first = make_trainer(LinearProbeConfig(), **words)
    first.train_task(first.scenario[0])
    state = load_snapshot(tmp_path / "run" / "_state")
    weights = state["weights"]
    name = next(iter(weights))
    frozen = "base_model.model.vit.base_layer.layernorm.weight"
    changes = {
        "finished_tasks": [-1, 10**9, "1", True],
        "accuracy_matrix": [[], "x", [[1.0]], None],
        "weights": [{}, [], {**weights, frozen: torch.zeros(48)}, {**weights, name: torch.zeros(3)}, {name: 1}],
        "random": [{}, [], {"python": 1, "numpy": 2, "torch": 3, "cuda": []}],
        "settings": [{}, None, {"scenario": 1}],
        "strategy": [None, 3],
        "train_seconds": ["1", None],
    }
    for field, values in changes.items():
        for value in values:
            save_snapshot(tmp_path / "run" / "_state", {**state, field: value})
            with pytest.raises(ValueError):
                make_trainer(LinearProbeConfig(), **words).resume(tmp_path / "run")
                pytest.fail(f"{field} {str(value)[:100]} was taken")
    save_snapshot(tmp_path / "run" / "_state", state)
    resumed = make_trainer(LinearProbeConfig(), **words)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.finished_tasks == 2


JUNK = [None, True, 2, "x", [], ["x"], [2.0], [[1, "x"]], [[1], [1, 2]], {}, {"x": 1}, {"x": [1]}, torch.zeros(())]


@pytest.mark.slow
@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_no_field_of_a_snapshot_ends_a_run_late(make_trainer, tmp_path, junk):
    """Whatever stands in one field is refused when the run is resumed, or harms nothing."""
    words = {"num_tasks": 2, "num_train_epochs": 1}
    config = L2PConfig(prompt_length=2, pool_size=4, top_k=2, head="ridge")
    first = make_trainer(config, **words)
    first.train_task(first.scenario[0])
    state = load_snapshot(tmp_path / "run" / "_state")
    assert {"prompt_usage", "details", "learnt", "without_prompts", "baseline"} <= set(state)
    taken = []
    for field in state:
        save_snapshot(tmp_path / "run" / "_state", {**state, field: junk})
        trainer = make_trainer(config, **words)
        try:
            trainer.resume(tmp_path / "run")
        except ValueError as error:
            assert len(str(error)) > 30, f"{field} was refused without a word"
            continue
        taken.append(field)
        trainer.results.save(tmp_path / "results.json")
        RunResults.load(tmp_path / "results.json")
    assert len(taken) < len(state) / 2
