"""Metrics against values worked out by hand; the record of a run on disk; the table of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from peft_cl.metrics import (
    RunResults,
    average_incremental_accuracy,
    backward_transfer,
    continual_metrics,
    final_average_accuracy,
    finished_tasks,
    forgetting,
    forward_transfer,
    per_step_forgetting,
    results_table,
)
from peft_cl.metrics.table import differences, group_of


NAN = math.nan
# Task 0 is best after task 1 (0.9), so forgetting and negative backward transfer differ.
MATRIX = [[0.8, NAN, NAN], [0.9, 0.6, NAN], [0.5, 0.4, 0.7]]


def test_metrics_by_hand():
    # last row: (0.5 + 0.4 + 0.7) / 3
    assert final_average_accuracy(MATRIX) == pytest.approx(1.6 / 3)
    # steps: 0.8, (0.9 + 0.6) / 2 = 0.75, 1.6 / 3
    assert average_incremental_accuracy(MATRIX) == pytest.approx((0.8 + 0.75 + 1.6 / 3) / 3)
    # task 0: max(0.8, 0.9) - 0.5 = 0.4; task 1: 0.6 - 0.4 = 0.2
    assert forgetting(MATRIX) == pytest.approx(0.3)
    # task 0: 0.5 - 0.8 = -0.3; task 1: 0.4 - 0.6 = -0.2
    assert backward_transfer(MATRIX) == pytest.approx(-0.25)


def test_continual_metrics_names_them():
    metrics = continual_metrics(MATRIX)
    assert metrics == {
        "average_accuracy": final_average_accuracy(MATRIX),
        "average_incremental_accuracy": average_incremental_accuracy(MATRIX),
        "forgetting": forgetting(MATRIX),
        "per_step_forgetting": per_step_forgetting(MATRIX),
        "backward_transfer": backward_transfer(MATRIX),
    }
    assert all(type(value) is float for value in metrics.values())


def test_values_above_the_diagonal_count_for_forward_transfer_only():
    measured = [[0.8, 0.3, 0.1], [0.9, 0.6, 0.2], [0.5, 0.4, 0.7]]
    metrics = continual_metrics(measured, baseline=[0.1, 0.2, 0.3])
    # (0.3 - 0.2 + 0.2 - 0.3) / 2
    assert metrics.pop("forward_transfer") == pytest.approx(0.0)
    assert metrics == continual_metrics(MATRIX)
    assert forward_transfer(measured, [0.1, 0.1, 0.1]) == pytest.approx((0.2 + 0.1) / 2)


def test_forward_transfer_needs_its_measurements():
    with pytest.raises(ValueError, match=r"tasks \[1, 2\] before they are learnt"):
        forward_transfer(MATRIX, [0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        forward_transfer(MATRIX, [0.1, 0.1])


def test_tasks_that_improve_have_negative_forgetting():
    assert forgetting([[0.5, NAN], [0.7, 0.9]]) == pytest.approx(-0.2)  # 0.5 - 0.7
    assert backward_transfer([[0.5, NAN], [0.7, 0.9]]) == pytest.approx(0.2)


def test_best_accuracy_before_the_last_task_only():
    """The last row is no candidate for the maximum, otherwise forgetting could not be negative."""
    # task 0: max(0.5, 0.6) - 0.8 = -0.2; task 1: 0.5 - 0.5 = 0
    assert forgetting([[0.5, NAN, NAN], [0.6, 0.5, NAN], [0.8, 0.5, 0.5]]) == pytest.approx(-0.1)


def test_single_task_has_nothing_to_forget():
    assert continual_metrics([[0.75]]) == {
        "average_accuracy": 0.75,
        "average_incremental_accuracy": 0.75,
        "forgetting": 0.0,
        "per_step_forgetting": 0.0,
        "backward_transfer": 0.0,
    }


@pytest.mark.parametrize("third_row", [[NAN, NAN, NAN], [0.5, 0.4, NAN], [None, None, None]])
def test_unfinished_matrix_gives_the_metrics_of_its_finished_part(third_row):
    unfinished = [MATRIX[0], MATRIX[1], third_row]
    assert finished_tasks(unfinished) == 2
    assert continual_metrics(unfinished) == continual_metrics([[0.8, None], [0.9, 0.6]])


def test_nothing_finished_is_an_error():
    nothing = np.full((2, 2), NAN)
    assert finished_tasks(nothing) == 0
    for metric in (
        final_average_accuracy,
        average_incremental_accuracy,
        forgetting,
        backward_transfer,
        continual_metrics,
    ):
        with pytest.raises(ValueError, match="No task .* finished"):
            metric(nothing)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.5]], r"got shape \(1, 2\)"),
        ([0.5], r"got shape \(1,\)"),
        ([[83.0]], "got 83.0; divide percentages by 100"),
        ([[-0.1]], "got -0.1"),
        ([[NAN, NAN], [0.5, 0.5]], "Row 1 .* is measured, but row 0 is not"),
    ],
)
def test_what_is_no_accuracy_matrix_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        continual_metrics(matrix)


def run(**changes) -> RunResults:
    fields = {
        "method": "CODA-Prompt",
        "peft_type": "CODA_PROMPT",
        "base_model": "vit",
        "dataset": "cifar100",
        "scenario": {"name": "class-incremental", "num_tasks": 3},
        "seed": 0,
        "task_names": ["task_0", "task_1", "task_2"],
        "accuracy_matrix": MATRIX,
        "test_sizes": [10, 20, 30],
        "metrics": continual_metrics(MATRIX),
        "trainable_parameters": 1234567,
        "total_parameters": 5000000,
        "adapter_bytes": 4_938_268,
        "train_seconds": 754.6,
        "hyperparameters": {"learning_rate": 1e-3, "betas": [0.9, 0.999]},
        "versions": {"torch": "2.0"},
        "command": "peft-cl train coda.yaml",
        "finished_tasks": 3,
    }
    return RunResults(**{**fields, **changes})


class TestRunResults:
    def test_record_read_back_is_the_one_saved(self, tmp_path):
        saved = run(
            metrics={"average_accuracy": 0.5, "forgetting": NAN}, peft_type=None, adapter_bytes=None, command=None
        )
        path = saved.save(tmp_path / "new" / "run.json")
        assert RunResults.load(path) == saved

    def test_prompt_usage_is_kept_and_a_file_from_before_it_is_read(self, tmp_path):
        counts = np.array([[3, 1], [0, 4], [2, 2]])
        path = run(prompt_usage=counts).save(tmp_path)
        assert RunResults.load(path) == run(prompt_usage=counts)
        assert RunResults.load(path).prompt_usage == [[3, 1], [0, 4], [2, 2]]
        assert RunResults.load(run(finished_tasks=2, prompt_usage=counts[:2]).save(tmp_path)).prompt_usage[1] == [0, 4]
        assert "prompt_usage" not in json.loads(run().save(tmp_path).read_text())
        assert RunResults.load(path).prompt_usage is None

    def test_folder_means_its_results_file(self, tmp_path):
        assert run().save(tmp_path) == tmp_path / "results.json"
        assert RunResults.load(str(tmp_path)) == run()

    def test_file_is_strict_json_with_null_for_nan(self, tmp_path):
        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        path = run(accuracy_matrix=np.array(MATRIX)).save(tmp_path)
        record = json.loads(path.read_text(), parse_constant=refuse)
        assert record["accuracy_matrix"][0] == [0.8, None, None] and record["format_version"] == 1

    def test_numpy_values_become_plain_ones(self, tmp_path):
        path = run(seed=np.int64(3), hyperparameters={"layers": np.arange(2), "rate": np.float32(0.5)}).save(tmp_path)
        assert RunResults.load(path).hyperparameters == {"layers": [0, 1], "rate": 0.5}

    def test_failed_save_leaves_the_old_file_and_nothing_beside_it(self, tmp_path, monkeypatch):
        run().save(tmp_path)
        with pytest.raises(TypeError, match="cannot hold .*object"):
            run(hyperparameters={"bad": object()}).save(tmp_path)

        def interrupted(_):
            raise OSError("disk full")

        monkeypatch.setattr("os.fsync", interrupted)
        with pytest.raises(OSError, match="disk full"):
            run(seed=1).save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
        assert RunResults.load(tmp_path) == run()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text[: len(text) // 2], "damaged, it is not readable as JSON"),
            (lambda text: "[1, 2]", "not the record of a run"),
            (lambda text: "{}", "not the record of a run"),
            (lambda text: text.replace('"format_version": 1', '"format_version": 99'), "version 99.*update"),
            (lambda text: text.replace('"seed"', '"sede"'), r"missing fields \['seed'\], unknown fields \['sede'\]"),
            (lambda text: text.replace('"task_2"', '"task_2", "task_3"'), "3 rows.*4 tasks"),
            (lambda text: text.replace('"train_seconds": 754.6', '"train_seconds": 754.6,,'), "damaged"),
            (lambda text: text.replace("0.9,", '"high",', 1), "damaged"),
        ],
    )
    def test_file_that_is_no_good_is_named(self, tmp_path, change, message):
        path = run().save(tmp_path)
        path.write_text(change(path.read_text()))
        with pytest.raises(ValueError, match=f"results.json.*({message})"):
            RunResults.load(path)

    def test_missing_file_is_told(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing.json"):
            RunResults.load(tmp_path / "nothing.json")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"accuracy_matrix": [[0.5]]}, r"1 rows of the lengths \[1\], but 3 tasks"),
            ({"test_sizes": [1]}, "test_sizes has 1 entries"),
            ({"finished_tasks": 4}, "finished_tasks is 4, but there are 3 tasks"),
            ({"prompt_usage": [[1, 2], [3, 4]]}, "prompt_usage has 2 entries, but finished_tasks is 3"),
            ({"prompt_usage": [[1, 2], [3, 4], [5]]}, "as many for each task"),
            ({"prompt_usage": [[1, 2], [3, 4], [5, -6]]}, "got -6.0"),
        ],
    )
    def test_contradicting_fields_are_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            run(**changes)


class TestResultsTable:
    def test_table_of_one_run(self):
        # 1.6 / 3 = 53.33%, forgetting 30%, 754.6 s = 12 min 35 s, 4.94 MB
        assert results_table([run()]).splitlines() == [
            "| Method | Final average accuracy (%) | Forgetting (%) | Training time | Trainable parameters "
            "| Adapter size |",
            "|---|---:|---:|---:|---:|---:|",
            "| CODA-Prompt | 53.33 | 30.00 | 12 min 35 s | 1,234,567 | 4.94 MB |",
        ]
        assert run().markdown_row() == results_table([run()]).splitlines()[2]

    def test_seeds_become_mean_and_sample_standard_deviation(self):
        runs = [
            run(seed=seed, metrics={"average_accuracy": accuracy, "forgetting": 0.1}, train_seconds=seconds)
            for seed, accuracy, seconds in ((0, 0.70, 50), (1, 0.72, 60), (2, 0.77, 70))
        ]
        # mean 73; deviations -3, -1, 4: sqrt(26 / 2) = 3.61
        assert results_table(runs).splitlines()[2] == (
            "| CODA-Prompt (n = 3) | 73.00 ± 3.61 | 10.00 ± 0.00 | 1 min 00 s | 1,234,567 | 4.94 MB |"
        )

    def test_methods_keep_their_order_and_unfinished_runs_their_own_line(self):
        runs = [run(method="L2P"), run(), run(method="L2P", seed=1), run(seed=1, finished_tasks=2)]
        methods = [line.split(" | ")[0] for line in results_table(runs).splitlines()[2:]]
        assert methods == ["| L2P (n = 2)", "| CODA-Prompt", "| CODA-Prompt (2 of 3 tasks)"]

    def test_runs_with_other_settings_are_no_seeds_of_one_line(self):
        slow, fast = {"learning_rate": 0.02, "seed": 0}, {"learning_rate": 0.5, "seed": 1}
        runs = [run(hyperparameters=slow), run(seed=1, hyperparameters=fast), run(method="L2P", hyperparameters=fast)]
        methods = [line.split(" | ")[0] for line in results_table(runs).splitlines()[2:]]
        assert methods == ["| CODA-Prompt (learning_rate 0.02)", "| CODA-Prompt (learning_rate 0.5)", "| L2P"]
        runs = [run(), run(finished_tasks=2, hyperparameters=fast)]
        assert "| CODA-Prompt (no betas, learning_rate 0.5) (2 of 3 tasks) |" in results_table(runs)

    def test_what_is_not_known_is_a_dash(self):
        row = run(
            method="a|b", metrics={"average_accuracy": 0.5}, adapter_bytes=None, train_seconds=7322
        ).markdown_row()
        assert row == "| a\\|b | 50.00 | – | 2 h 02 min | 1,234,567 | – |"
        assert run(adapter_bytes=15_400, train_seconds=8.25).markdown_row().endswith("| 8.2 s | 1,234,567 | 15.4 kB |")

    @pytest.mark.parametrize("change", [{"dataset": "pacs"}, {"base_model": "deit"}, {"scenario": {"name": "other"}}])
    def test_runs_that_do_not_compare_are_refused(self, change):
        with pytest.raises(ValueError, match="do not compare"):
            results_table([run(), run(method="L2P", **change)])

    def test_no_runs_and_the_same_seed_twice_are_refused(self):
        with pytest.raises(ValueError, match="no runs"):
            results_table([])
        with pytest.raises(ValueError, match="two runs of 'CODA-Prompt' with the same settings and the seed 0"):
            results_table([run(), run()])


DOMAINS = {"photo": (7, 1339, 331), "sketch": (7, 3145, 784), "cartoon": (5, 1878, 466)}
SETTINGS = {
    "learning_rate": 1e-3,
    "adapter": {"prompt_length": 8, "layers": [0, 1]},
    "augmentation": None,
    "seed": 0,
    "device": "cpu",
}


def of_domains(*order: str, seed: int | None = 0, **changes) -> RunResults:
    """A run over domains, whose names and sizes come in the order that the seed has drawn."""
    classes, train, test = (list(numbers) for numbers in zip(*(DOMAINS[name] for name in order), strict=True))
    scenario = {
        "name": "domain-incremental",
        "num_tasks": len(order),
        "boundaries": True,
        "settings": {"blur": 0.5, "stream_seed": seed},
        "seed": seed,
        "class_order": ["dog", *order],
        "task_names": list(order),
        "classes_per_task": classes,
        "train_sizes": train,
        "test_sizes": test,
    }
    fields = {"seed": seed or 0, "scenario": scenario, "task_names": list(order), "test_sizes": test}
    return run(**{"hyperparameters": {**SETTINGS, "seed": seed}, **fields, **changes})


ONE = of_domains("photo", "sketch", "cartoon")


class TestGroupOf:
    @pytest.mark.parametrize(
        "other",
        [
            of_domains("cartoon", "photo", "sketch", seed=1),
            of_domains("photo", "sketch", "cartoon", hyperparameters={**SETTINGS, "device": "cuda", "threads": 8}),
            of_domains("photo", "sketch", "cartoon", versions={"torch": "2.1"}, command="again", finished_tasks=2),
            of_domains(  # a record from before a setting was recorded
                *("photo", "sketch", "cartoon"),
                scenario={name: value for name, value in ONE.scenario.items() if name != "boundaries"},
                hyperparameters={"learning_rate": 1e-3, "adapter": {**SETTINGS["adapter"], "task_evidence": 0.0}},
            ),
            of_domains("photo", "sketch", "cartoon", hyperparameters={**SETTINGS, "adam_epsilon": 1e-8}),
        ],
    )
    def test_seed_and_place_make_no_difference(self, other):
        assert group_of(other) == group_of(ONE)

    def test_a_task_of_other_classes_may_be_of_another_size(self):
        scenario = {"name": "class-incremental", "classes_per_task": [2, 2, 2]}
        first = run(scenario={**scenario, "seed": 0, "train_sizes": [50, 60, 70]}, test_sizes=[5, 6, 7])
        second = run(scenario={**scenario, "seed": 1, "train_sizes": [80, 50, 50]}, test_sizes=[8, 5, 5])
        assert group_of(first) == group_of(second)
        fewer = run(scenario={**scenario, "seed": 1, "train_sizes": [50, 50, 50]}, test_sizes=[8, 5, 5])
        assert group_of(first) != group_of(fewer)
        uneven = {**first.scenario, "classes_per_task": [4, 1, 1]}
        assert group_of(first) != group_of(run(scenario=uneven, test_sizes=[5, 6, 7]))

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"method": "L2P"}, "method L2P"),
            ({"dataset": "pacs"}, "dataset pacs"),
            ({"base_model": "deit"}, "base_model deit"),
            ({"scenario": {**ONE.scenario, "name": "task-free"}}, "name task-free"),
            ({"scenario": {**ONE.scenario, "boundaries": False}}, "boundaries False"),
            ({"scenario": {**ONE.scenario, "settings": {"blur": 0.1}}}, "blur 0.1"),
            ({"scenario": {**ONE.scenario, "train_sizes": [1, 2, 3]}}, "train_examples 6"),
            ({"test_sizes": [1, 2, 3]}, "test_examples 6"),
            ({"hyperparameters": {**SETTINGS, "learning_rate": 0.5}}, "learning_rate 0.5"),
            ({"hyperparameters": {**SETTINGS, "learning_rates": {"pool": 0.1}}}, "learning_rates.pool 0.1"),
            ({"hyperparameters": {**SETTINGS, "augmentation": "crop"}}, "augmentation crop"),
            (
                {"hyperparameters": {**SETTINGS, "adapter": {"prompt_length": 4, "layers": [0]}}},
                "layers [0], prompt_length 4",
            ),
            ({"hyperparameters": {}}, "no layers, no prompt_length, …"),
        ],
    )
    def test_what_else_differs_tells_runs_apart(self, changes, told):
        other = of_domains("photo", "sketch", "cartoon", **changes)
        assert group_of(other) != group_of(ONE)
        assert differences(["same", "alone", "same"], [group_of(ONE), (), group_of(other)])[1:] == ["", told]

    def test_an_order_that_was_chosen_is_a_setting(self):
        orders = ("photo", "sketch", "cartoon"), ("sketch", "photo", "cartoon")
        first, second = (of_domains(*order, seed=None) for order in orders)
        assert group_of(first) != group_of(second)

    def test_labels_stay_short_and_apart(self):
        tried = [("a", 1, 1, 1), ("b", 1, 1, 1), ("b", 1, 2, 1), ("b", 1, 2, 2)]
        groups = [tuple(zip("abcd", values, strict=True)) for values in tried]
        assert differences(["same"] * 4, groups) == [
            "a a, c 1, d 1",
            "a b, c 1, d 1",
            "a b, c 2, d 1",
            "a b, c 2, d 2",
        ]
        long = [(("path", f"/data/{'x' * 20}{letter}{'y' * 20}"),) for letter in "ab"]
        (first, second) = differences(["same"] * 2, long)
        assert first != second and max(map(len, (first, second))) < 45

    def test_the_recorded_benchmarks_are_grouped_by_their_seeds(self):
        folder = Path(__file__).parents[1] / "benchmarks" / "results"
        for name in ("pacs", "tiny-imagenet-cl"):
            table = results_table([RunResults.load(path) for path in sorted((folder / name).glob("*/results.json"))])
            lines = table.splitlines()[2:]
            assert len(lines) > 5 and all("(n = 3)" in line for line in lines), table
