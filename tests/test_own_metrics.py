"""Metrics of the user's own, beside the accuracies: what they get, where they are told, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
from own_metrics_cases import (
    NAMES,
    READY_MADE,
    Spy,
    accuracy,
    make_run,  # noqa: F401
)
from transformers import TrainerCallback

from peft_cl import LinearProbeConfig, domain_incremental, task_free, task_incremental
from peft_cl.metrics import RunResults, confusion_matrix, f1, top_k_accuracy
from peft_cl.strategies import NearestClassMean


class Told(TrainerCallback):
    """Keeps what each measurement gives."""

    def __init__(self):
        self.metrics: list[dict] = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(metrics)


def test_they_are_told_beside_the_accuracies_which_stay_as_they_were(run, tmp_path):
    trainer, alone = run(READY_MADE), run(None, folder="alone")
    assert np.array_equal(trainer.whole_matrix, alone.whole_matrix, equal_nan=True)
    assert trainer.metrics == alone.metrics and alone.results.own_metrics is None
    assert "own_metrics" not in json.loads((tmp_path / "alone" / "results.json").read_text())
    own = trainer.results.own_metrics
    assert set(own) == NAMES and all(len(values) == 3 for values in own.values())
    assert RunResults.load(tmp_path / "run").own_metrics == own
    matrices = np.array(own["confusion_matrix"])
    assert matrices.shape == (3, 6, 6) and matrices.sum(axis=(1, 2)).tolist() == [16] * 3
    for task, matrix in enumerate(matrices):
        assert np.trace(matrix) / matrix.sum() == trainer.accuracy_matrix[-1, task]
        assert matrix.sum(axis=1).nonzero()[0].tolist() == [2 * task, 2 * task + 1]  # true classes are rows
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert last["eval_macro_f1"] == pytest.approx(np.mean(own["macro_f1"]))
    assert [last[f"eval_top_2_accuracy_task_{task}"] for task in range(3)] == own["top_2_accuracy"]
    assert not any("confusion" in name for name in last)
    again = trainer.evaluate()
    assert again["eval_confusion_matrix_task_1"] == own["confusion_matrix"][1]
    assert again["eval_average_accuracy"] == trainer.metrics["average_accuracy"]


def test_each_task_comes_apart_with_the_scores_of_the_classes_seen(run):
    spy = Spy()
    trainer = run(spy)
    tried, measured = spy.calls[:3], spy.calls[3:]
    sizes = [(16, 2), (16, 4), (16, 4), (16, 6), (16, 6), (16, 6)]
    assert [call.predictions.shape for call in measured] == sizes
    assert [call.predictions.shape[1] for call in tried] == [2, 4, 6]  # as they come
    assert all(call.predictions.dtype == np.float32 for call in spy.calls)
    assert [sorted(set(call.label_ids.tolist())) for call in measured[3:]] == [[0, 1], [2, 3], [4, 5]]
    assert trainer.results.own_metrics["spied"] == trainer.accuracy_matrix[-1].tolist()


def test_of_a_known_task_the_other_classes_are_out(run, data):
    spy = Spy()
    run([spy, top_k_accuracy(1)], scenario=task_incremental(data, 3), num_train_epochs=1)
    for call in (spy.calls[1], spy.calls[-1]):  # tried, and measured
        finite = np.isfinite(call.predictions)
        task = call.label_ids[0] // 2
        assert finite[:, 2 * task : 2 * task + 2].all() and finite.sum() == 2 * len(finite)


def test_what_a_strategy_predicts_is_what_they_get(run):
    class Reversed(NearestClassMean):
        def predict(self, trainer, inputs, logits):
            return -logits

    spy = Spy()
    trainer = run(spy, strategy=Reversed())
    assert trainer.results.own_metrics["spied"] == trainer.accuracy_matrix[-1].tolist()
    assert np.mean(trainer.accuracy_matrix[-1]) < 0.5


def test_a_stream_and_tasks_to_come(run, data):
    spy = Spy()
    streamed = run(spy, scenario=task_free(data, 3), num_train_epochs=1, lr_scheduler_type="constant")
    assert {call.predictions.shape[1] for call in spy.calls} == {6}
    assert streamed.results.own_metrics["spied"] == streamed.accuracy_matrix[-1].tolist()
    columns = {split: part.add_column("domain", np.arange(len(part)) % 3) for split, part in data.items()}
    words = {"scenario": domain_incremental(columns), "num_train_epochs": 1, "folder": "ahead"}
    told = Told()
    ahead = run(Spy(), measure_ahead=True, callbacks=[told], **words)
    first = told.metrics[0]  # before task 0
    assert first["eval_spied_2"] == first["eval_accuracy_2"] and first["eval_spied"] == first["eval_spied_0"]
    assert ahead.results.own_metrics["spied"] == ahead.accuracy_matrix[-1].tolist()


def test_other_examples_and_predictions(run, data):
    trainer = run(READY_MADE)
    found = trainer.evaluate(data["test"])
    rows = trainer.predict(data["test"])
    assert rows.predictions.shape == (48,) and len(rows.names) == 48
    assert rows.metrics["test_macro_f1"] == found["eval_macro_f1"]
    assert rows.metrics["test_confusion_matrix"] == found["eval_confusion_matrix"]
    assert np.trace(found["eval_confusion_matrix"]) / 48 == found["eval_accuracy"] == rows.metrics["test_accuracy"]
    whole = np.sum(trainer.results.own_metrics["confusion_matrix"], axis=0)
    assert whole.tolist() == found["eval_confusion_matrix"]
    assert trainer.predict(data["test"].remove_columns("label")).predictions.tolist() == rows.predictions.tolist()


def test_a_dict_names_them(run):
    functions = {
        "kappa": lambda prediction: sklearn.metrics.cohen_kappa_score(
            prediction.label_ids, prediction.predictions.argmax(-1)
        ),
        "mine": f1(),
    }
    own = run(functions, num_train_epochs=1).results.own_metrics
    assert set(own) == {"kappa", "mine_macro_f1"} and all(-1 <= value <= 1 for value in own["kappa"])


def test_scores_may_be_changed_by_a_function(run):
    def spoils(prediction):
        prediction.predictions[:], prediction.label_ids[:] = 0, 0
        return {"nothing": 0}

    spy = Spy()
    trainer = run([spoils, spy], num_train_epochs=1)
    assert trainer.results.own_metrics["spied"] == trainer.accuracy_matrix[-1].tolist()
    assert trainer.results.own_metrics["nothing"] == [0, 0, 0]


def test_the_record_may_be_read_while_a_task_is_measured(make_trainer):
    class Reads(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            found.append(trainer.results.own_metrics)

    found = []
    trainer = make_trainer(LinearProbeConfig(), compute_metrics=f1(), num_train_epochs=1, callbacks=[Reads()])
    trainer.train()
    assert [own and len(own["macro_f1"]) for own in found] == [None, 1, 2]  # of the tasks finished


# ----------------------------------------------------------------------------------------------- failing later


def test_what_fails_on_the_images_is_told_and_not_a_number(make_trainer, caplog):
    tried = []

    def fragile(prediction):
        tried.append(prediction)
        if len(tried) > 3 and prediction.label_ids[0] == 0:
            raise ZeroDivisionError("one class only")
        if len(tried) > 3 and prediction.label_ids[0] == 2:
            return {"fragile": math.inf}
        return {"fragile": 1.0}

    trainer = make_trainer(LinearProbeConfig(), compute_metrics=[fragile, f1()], num_train_epochs=1)
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    logging.getLogger("peft_cl").addHandler(caplog.handler)
    try:
        trainer.train()
    finally:
        library.removeHandler(caplog.handler)
        logging.getLogger("peft_cl").removeHandler(caplog.handler)
    own = trainer.results.own_metrics
    assert math.isnan(own["fragile"][0]) and math.isnan(own["fragile"][1]) and own["fragile"][2] == 1.0
    assert all(math.isfinite(value) for value in own["macro_f1"])
    assert "fragile" in caplog.text and "fails on the images of task_0 and is NaN there" in caplog.text
    assert "ZeroDivisionError: one class only." in caplog.text and "fragile, but inf is neither" in caplog.text
    assert trainer.finished_tasks == 3


# ----------------------------------------------------------------------------------------------- choosing


def test_the_best_checkpoint_by_one_of_them(make_trainer, data):
    """A metric that falls from one evaluation to the next: the first is the best."""
    calls = []

    def falling(prediction):
        calls.append(0)
        return {"falling": -float(len(calls))}

    words = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3, "validation": data["train"]}
    words |= {"load_best_model_at_end": True, "metric_for_best_model": "falling"}
    trainer = make_trainer(LinearProbeConfig(), compute_metrics=falling, num_tasks=1, **words)
    trainer.train()
    assert trainer.state.best_metric < 0 and trainer.state.best_model_checkpoint.endswith("checkpoint-12")
    once = make_trainer(LinearProbeConfig(), num_tasks=1, folder="once", **{**words, "metric_for_best_model": "loss"})
    once.train()
    assert once.state.best_model_checkpoint.endswith("checkpoint-36")


def test_within_a_task_they_are_of_validation_images_and_stay_out_of_the_record(make_trainer):
    spy = Spy()
    trainer = make_trainer(LinearProbeConfig(), compute_metrics=spy, eval_strategy="epoch", validation_fraction=0.25)
    spy.calls.clear()
    trainer.train()
    assert [len(call.label_ids) for call in spy.calls[:3]] == [8, 8, 16]  # two epochs, and the task's test images
    assert trainer.results.own_metrics["spied"] == trainer.accuracy_matrix[-1].tolist()


@pytest.mark.parametrize(
    ("functions", "name", "message"),
    [
        (None, "f1", "'f1', but must be one of loss, average_accuracy, accuracy_task_0. Take one.*compute_metrics="),
        (f1(), "f1", "must be one of loss, average_accuracy, accuracy_task_0, macro_f1, macro_f1_task_0"),
        (f1(), "macro_f1_task_1", "'macro_f1_task_1', but must be one of"),
        (confusion_matrix(), "confusion_matrix", "'confusion_matrix', but must be one of loss"),
        (f1(), "losses", "'losses', but must be one of"),
    ],
)
def test_a_metric_to_choose_by_must_be_measured(functions, name, message, make_trainer):
    words = {"eval_strategy": "epoch", "validation_fraction": 0.25, "metric_for_best_model": name}
    with pytest.raises(ValueError, match=message):
        make_trainer(LinearProbeConfig(), compute_metrics=functions, **words)


def test_names_that_may_be_chosen_by(make_trainer):
    words = {"eval_strategy": "epoch", "validation_fraction": 0.25}
    for name in ("macro_f1", "eval_macro_f1", "macro_f1_task_0", "average_accuracy", "eval_loss"):
        make_trainer(LinearProbeConfig(), compute_metrics=f1(), metric_for_best_model=name, **words)


# ----------------------------------------------------------------------------------------------- refused before


def gives(value):
    return lambda prediction: {"it": value}


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ("f1", "compute_metrics has 'f1', but must have functions. Give a function of transformers.EvalPrediction"),
        ([f1(), 3], "compute_metrics has 3, but must have functions"),
        ({1: f1()}, "must have functions"),
        (lambda: 1, "fails on fake logits of the classes of task 'task_0': TypeError.*predictions \\(4, 2\\)"),
        (lambda prediction: {"x": {}["x"]}, "'task_0': KeyError: 'x'. Correct it: it is called with"),
        (lambda prediction: 0.5, "it gives 0.5, but must give values by name"),
        (lambda prediction: None, "it gives None, but must give values by name"),
        (lambda prediction: {}, "it gives {}, but must give values by name"),
        (lambda prediction: {3: 0.5}, "it gives {3: 0.5}, but must give values by name"),
        (gives("high"), "it gives it, but 'high' is neither a finite number nor a list of such"),
        (gives(True), "it gives it, but True is neither"),
        (gives(math.inf), "it gives it, but inf is neither"),
        (gives({"a": 1}), "it gives it, but {'a': 1} is neither"),
        (gives([[1, "x"]]), "it gives it, but 'x' is neither"),
        ({"mine": gives("high")}, r"compute_metrics\['mine'\] fails.*it gives mine_it, but 'high'"),
        (
            lambda prediction: {f"class_{row}": 1 for row in set(prediction.label_ids.tolist())},
            r"task 'task_1': it gives class_2 \(number\), class_3 \(number\), but gave class_0 .*must be the same",
        ),
        (lambda prediction: {"accuracy": 1}, "gives 'accuracy', but 'accuracy' is measured under that name already"),
        (lambda prediction: {"eval_loss": 1}, "gives 'loss'.*{'my': function} gives 'my_loss'"),
        (lambda prediction: {"accuracy_task_1": 1}, "gives 'accuracy_task_1', but 'accuracy_task_1' is measured"),
        ([f1(), f1()], "gives 'macro_f1', but 'macro_f1' is measured under that name already"),
        ([gives(1), {"a": 1}.get], "fails on fake logits"),
        (lambda prediction: {"a": 1, "a_task_1": 1}, "gives 'a_task_1', but 'a_task_1' is measured"),
    ],
)
def test_what_is_no_metric_is_told_before_training(functions, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(LinearProbeConfig(), compute_metrics=functions)


def test_the_remedy_for_a_name_that_is_taken_works(run):
    stock = lambda prediction: {"accuracy": accuracy(prediction)}  # noqa: E731
    trainer = run({"my": stock}, num_train_epochs=1)
    assert trainer.results.own_metrics["my_accuracy"] == trainer.accuracy_matrix[-1].tolist()


def test_warnings_about_fake_scores_are_not_shown(make_trainer, recwarn):
    def warns(prediction):
        warnings.warn("ill-defined", stacklevel=2)
        return {"warned": np.float32(0.5)}

    trainer = make_trainer(LinearProbeConfig(), compute_metrics=warns, num_train_epochs=1)
    assert not any("ill-defined" in str(each.message) for each in recwarn)
    trainer.train_task(trainer.scenario[0])
    assert any("ill-defined" in str(each.message) for each in recwarn)
