"""Metrics of the user's own, beside the accuracies: what they get, where they are told, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from trainer_cases import CONFIGS, whole_and_resumed
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback

from peft_cl import LinearProbeConfig, class_incremental, domain_incremental, task_free, task_incremental
from peft_cl.hub import model_card
from peft_cl.metrics import RunResults, confusion_matrix, f1, top_k_accuracy
from peft_cl.metrics.own import means_over_tasks, own_value
from peft_cl.metrics.scores import confusion_counts, mean_f1, share_in_top_k
from peft_cl.strategies import NearestClassMean


PROCESS = Path(__file__).with_name("sequence_process.py")
READY_MADE = [top_k_accuracy(2), f1(), confusion_matrix()]
NAMES = {"top_2_accuracy", "macro_f1", "confusion_matrix"}


def example(classes: int = 7, count: int = 200, seed: int = 0) -> EvalPrediction:
    """Scores without ties; the last class occurs neither as label nor, its scores being low, as prediction."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(count, classes)).astype(np.float32)
    scores[:, -1] -= 100
    return EvalPrediction(predictions=scores, label_ids=rng.integers(0, classes - 1, count))


def accuracy(prediction: EvalPrediction) -> float:
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


class Spy:
    """Keeps what it is called with, and gives the accuracy under a name of its own."""

    def __init__(self):
        self.calls: list[EvalPrediction] = []

    def __call__(self, prediction: EvalPrediction) -> dict:
        self.calls.append(prediction)
        return {"spied": accuracy(prediction)}


class Told(TrainerCallback):
    """Keeps what each measurement gives."""

    def __init__(self):
        self.metrics: list[dict] = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(metrics)


# ----------------------------------------------------------------------------------------------- ready-made ones


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_is_that_of_scikit_learn(k):
    found = example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k of all classes says nothing, it warns
        expected = sklearn.metrics.top_k_accuracy_score(
            found.label_ids, found.predictions, k=k, labels=np.arange(found.predictions.shape[1])
        )
    assert top_k_accuracy(k)(found) == {f"top_{k}_accuracy": pytest.approx(expected)}


@pytest.mark.parametrize("average", ["macro", "weighted"])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_f1_is_that_of_scikit_learn(average, classes):
    found = example(classes + 1)
    predicted = found.predictions.argmax(-1)
    predicted[found.label_ids == 0] = 1  # a class that is never predicted, with a mean over the others too
    expected = sklearn.metrics.f1_score(found.label_ids, predicted, average=average, zero_division=0)
    assert mean_f1(predicted, found.label_ids, average) == pytest.approx(expected)
    whole = sklearn.metrics.f1_score(found.label_ids, found.predictions.argmax(-1), average=average)
    assert f1(average)(found) == {f"{average}_f1": pytest.approx(whole)}


def test_the_confusion_matrix_is_that_of_scikit_learn():
    found = example()
    counts = confusion_matrix()(found)["confusion_matrix"]
    expected = sklearn.metrics.confusion_matrix(found.label_ids, found.predictions.argmax(-1), labels=np.arange(7))
    assert counts == expected.tolist() and all(type(value) is int for row in counts for value in row)


def test_by_hand():
    # Classes 0, 1, 2 of 4 images; predicted 0, 0, 2, 1: TP 1, 0, 1; FP 1, 1, 0; FN 0, 1, 1.
    assert mean_f1([0, 0, 2, 1], [0, 1, 2, 2], "macro") == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert mean_f1([0, 0, 2, 1], [0, 1, 2, 2], "weighted") == pytest.approx((2 / 3 + 0 + 2 * 2 / 3) / 4)
    assert confusion_counts([0, 0, 2, 1], [0, 1, 2, 2], 3).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]


def test_of_equal_scores_the_first_comes_first_as_in_the_accuracy():
    scores, labels = np.zeros((3, 3)), np.arange(3)
    assert [share_in_top_k(scores, labels, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert share_in_top_k(scores, labels, 1) == accuracy(EvalPrediction(scores, labels))
    assert share_in_top_k(np.full((2, 2), np.nan), [0, 1], 2) == 0.0  # a model that broke has no rank
    masked = np.array([[0.2, 0.1, -np.inf, -np.inf]])  # the task is known
    assert share_in_top_k(masked, [1], 1) == 0.0 and share_in_top_k(masked, [1], 5) == 1.0


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "5", math.nan])
def test_a_k_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match="k is .*, but must be a whole number of at least 1. Give one such as 5"):
        top_k_accuracy(k)


@pytest.mark.parametrize("average", ["micro", None, 1])
def test_an_average_that_is_none_is_refused(average):
    with pytest.raises(ValueError, match="average is .*, but must be 'macro' or 'weighted'"):
        f1(average)


# ----------------------------------------------------------------------------------------------- a run


@pytest.fixture
def run(make_trainer):
    """`run(functions, ...)`: a trainer of a linear probe that has learnt its tasks."""

    def train(functions, config=None, **words):
        trainer = make_trainer(config or LinearProbeConfig(), compute_metrics=functions, **words)
        trainer.train()
        return trainer

    return train


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
        (lambda prediction: {"x": {}["x"]}, "'task_0': KeyError: 'x'. It is called with"),
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
