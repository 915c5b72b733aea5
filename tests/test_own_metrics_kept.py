"""Metrics of the user's own in runs that go on, in the record, on the card and from the command."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from own_metrics_cases import (
    NAMES,
    READY_MADE,
    make_run,  # noqa: F401
)
from peft import PeftModel
from trainer_cases import CONFIGS, whole_and_resumed
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_cl import LinearProbeConfig, class_incremental
from peft_cl.hub import model_card
from peft_cl.metrics import RunResults, f1, top_k_accuracy
from peft_cl.metrics.own import means_over_tasks, own_value


PROCESS = Path(__file__).with_name("sequence_process.py")


# ----------------------------------------------------------------------------------------------- going on


def test_a_run_that_was_interrupted_after_a_task(make_trainer):
    def make(**words):
        return make_trainer(LinearProbeConfig(), compute_metrics=READY_MADE, num_train_epochs=1, **words)

    whole, resumed = whole_and_resumed(make)
    assert resumed.results.own_metrics == whole.results.own_metrics and set(whole.results.own_metrics) == NAMES
    done = make(folder="whole")
    done.train(resume_from_checkpoint=True)  # nothing is left to measure
    assert done.results.own_metrics == whole.results.own_metrics


def test_a_run_that_was_interrupted_in_a_task(make_trainer):
    """Stopped early by one of them: the count of evaluations without a better one goes on."""

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if kwargs["model"].base_model.head.config.num_tasks == 1 and state.global_step == 10:
                raise KeyboardInterrupt

    words = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 5, "validation_fraction": 0.25}
    words |= {"metric_for_best_model": "macro_f1", "load_best_model_at_end": True, "learning_rate": 1e-3}

    def make(folder="run", *more):
        callbacks = [EarlyStoppingCallback(2), *more]
        return make_trainer(
            CONFIGS["l2p"](), compute_metrics=READY_MADE, callbacks=callbacks, num_tasks=2, folder=folder, **words
        )

    whole = make("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("run", Interrupt()).train()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.results.own_metrics == whole.results.own_metrics
    assert resumed.state.best_metric == whole.state.best_metric is not None
    assert resumed.results.learnt == whole.results.learnt
    assert whole.results.learnt[0]["epochs"] == 3  # of 5; interrupted after the second
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())


def test_other_metrics_may_be_given_to_a_run_that_goes_on(make_trainer):
    first = make_trainer(LinearProbeConfig(), compute_metrics=f1(), num_train_epochs=1)
    first.train_task(first.scenario[0])
    second = make_trainer(LinearProbeConfig(), compute_metrics=top_k_accuracy(2), num_train_epochs=1)
    second.train(resume_from_checkpoint=True)
    assert set(second.results.own_metrics) == {"top_2_accuracy"}


def test_an_adapter_that_learns_on_has_values_for_the_tasks_measured(make_trainer, tiny_vit, data, tmp_path):
    parts = [data["train"].filter(lambda row, own=own: row["label"] in own) for own in ((0, 1), (2, 3))]
    tests = [data["test"].filter(lambda row, own=own: row["label"] in own) for own in ((0, 1), (2, 3))]
    classes = (["red", "green"], ["blue", "yellow"])
    pairs = zip(parts, tests, classes, strict=True)
    scenarios = [class_incremental((train, test), 1, class_order=names) for train, test, names in pairs]
    make_trainer(LinearProbeConfig(), scenario=scenarios[0], num_train_epochs=1).train()
    for folder, more in (("without", {}), ("with", {"earlier_test": scenarios[0]})):
        model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "run", is_trainable=True)
        again = make_trainer(
            None,
            model=model,
            scenario=scenarios[1],
            compute_metrics=READY_MADE,
            num_train_epochs=1,
            folder=folder,
            **more,
        )
        again.train()
        own = again.results.own_metrics
        assert np.shape(own["confusion_matrix"][1]) == (4, 4)
        assert (own["macro_f1"][0] != own["macro_f1"][0]) == (folder == "without")
        assert RunResults.load(tmp_path / folder) == again.results
        assert math.isnan(means_over_tasks(own)["macro_f1"]) == (folder == "without")


def test_a_task_that_is_added_is_tried_too(make_trainer, data):
    def of_two(prediction):
        if prediction.predictions.shape[1] > 2:
            raise ValueError("two classes at most")
        return {"of_two": 1}

    pairs = [
        {split: part.filter(lambda row, own=own: row["label"] in own) for split, part in data.items()}
        for own in ((0, 1), (2, 3))
    ]
    words = {"scenario": class_incremental(pairs[0], 1, class_order=["red", "green"]), "num_train_epochs": 1}
    trainer = make_trainer(LinearProbeConfig(), compute_metrics=of_two, **words)
    trainer.train()
    with pytest.raises(ValueError, match="fails on fake logits of the classes of task 'later': ValueError: two"):
        trainer.train_task(pairs[1], name="later")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["probe+metrics+uneven", "coda+metrics"])
def test_two_processes_measure_what_one_does(method, tmp_path):
    for processes, folder in ((1, "one"), (2, "two")):
        words = [str(PROCESS), str(tmp_path / folder), method, "0", "anew"]
        if processes > 1:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLAIN": "1"}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment)
        assert done.stdout.splitlines()[-1:] == [f"processes {processes}"], done.stderr
    one, two = (RunResults.load(tmp_path / folder) for folder in ("one", "two"))
    assert one.own_metrics == two.own_metrics and one.own_metrics["top_2_accuracy"]
    assert [np.sum(matrix) for matrix in two.own_metrics["confusion_matrix"]] == [6, 6, 6]  # each image once


# ----------------------------------------------------------------------------------------------- record and card


def record(**changes) -> RunResults:
    facts = {"method": "L2P", "peft_type": "L2P", "base_model": "vit", "dataset": "data", "scenario": {}, "seed": 0}
    facts |= {"task_names": ["a", "b|c", "d"], "test_sizes": [5, 5, 5], "metrics": {}, "trainable_parameters": 1}
    facts |= {"total_parameters": 2, "adapter_bytes": None, "train_seconds": 1.0, "finished_tasks": 2}
    facts["accuracy_matrix"] = [[0.5, None, None], [0.5, 0.5, None], [None] * 3]
    return RunResults(**{**facts, **changes})


def test_a_record_reads_back(tmp_path):
    own = {"f1": [0.5, math.nan], "count": [3, np.int64(4)], "matrix": [np.eye(2, dtype=int), [[1.5, None], [0, 2]]]}
    saved = record(own_metrics=own)
    assert RunResults.load(saved.save(tmp_path)) == saved
    assert json.loads((tmp_path / "results.json").read_text())["own_metrics"]["f1"] == [0.5, None]
    assert saved.own_metrics["matrix"][0] == [[1, 0], [0, 1]]
    assert "own_metrics" not in json.loads(record().save(tmp_path).read_text())  # as in older records
    assert RunResults.load(tmp_path).own_metrics is None


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([1], r"own_metrics is \[1\], but must be lists of values by name"),
        ({"f1": 0.5}, r"own_metrics\['f1'\] is 0.5, but must be a list of one value for each of 2 finished tasks"),
        ({"f1": [0.5]}, "one value for each of 2 finished tasks"),
        ({"f1": [0.5, "x"]}, "'x' is neither a finite number"),
        ({"f1": [0.5, math.inf]}, "inf is neither"),
        ({"f1": [0.5, [[[[[[[[[1]]]]]]]]]]}, "neither a finite number nor a list of such, at most 8 deep"),
    ],
)
def test_a_record_of_junk_is_refused(own, message):
    with pytest.raises(ValueError, match=message):
        record(own_metrics=own)


def test_values_of_arrays_and_tensors():
    assert (
        own_value(torch.tensor(0.5)) == 0.5 and own_value(np.arange(2)) == [0, 1] and own_value(np.float32(1)) == 1.0
    )
    assert own_value(None) is math.nan and own_value(np.array([np.nan]))[0] is math.nan


def test_the_card_has_the_numbers_after_the_last_task(tmp_path):
    own = {"macro_f1": [0.25, 0.5], "<b>": [12345.678, math.nan], "confusion_matrix": [[[1]], [[1]]]}
    text = model_card(record(own_metrics=own))
    path = tmp_path / "README.md"
    path.write_text(text)
    lines = ModelCard.load(path).text.splitlines()
    assert "### Other metrics" in lines and "| Metric | Mean | a | b\\|c |" in lines
    assert "| macro_f1 | 0.375 | 0.25 | 0.5 |" in lines
    assert "| `<b>` | not measured | 1.235e+04 | not measured |" in lines
    assert "confusion" not in text and "Other metrics" not in model_card(record())


# ----------------------------------------------------------------------------------------------- the command


def test_the_section_metrics(train, tmp_path, capsys):
    assert train("--metrics", "[top-3-accuracy, macro-f1, confusion-matrix]", "--training.num_train_epochs", "1") == 0
    results = RunResults.load(tmp_path / "out")
    assert set(results.own_metrics) == {"top_3_accuracy", "macro_f1", "confusion_matrix"}
    mean = means_over_tasks(results.own_metrics)["macro_f1"]
    assert f"macro f1 {mean:.4g}" in capsys.readouterr().out
    assert "| top_3_accuracy |" in (tmp_path / "out" / "README.md").read_text()
    shutil.rmtree(tmp_path / "out" / "_state")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[macro_f1]", "There is no metric macro_f1. Did you mean macro-f1? Known: confusion-matrix, macro-f1, top-3"),
        ("[3]", "There is no metric 3. Known: confusion-matrix"),
        ("{macro-f1: null}", "metrics is {'macro-f1': None}, but must be a list of names, such as [macro-f1]"),
        ("[macro-f1, macro-f1]", "metrics has macro-f1 twice. Take one out"),
    ],
)
def test_a_section_that_is_wrong(value, message, refused):
    assert message in refused("--metrics", value)


def test_one_name_needs_no_list(refused):
    """What comes after it is wrong, so that nothing is trained."""
    message = refused(
        "--metrics", "macro-f1", "--training.metric_for_best_model", "f1", "--training.eval_strategy", "epoch"
    )
    assert "must be one of loss, average_accuracy, accuracy_task_0, macro_f1, macro_f1_task_0" in message
