"""`peft-cl compare`: a matrix of runs and its tables, and the faults in a suite that are told before the first run."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cli_fixtures import place  # noqa: F401

from peft_cl import RunResults
from peft_cl.cli import main
from peft_cl.commands.suites.suite import read_suite


METHODS = {
    "Fine-tuning": {"method": "fine-tuning", "category": "Naive"},
    "EWC": {"method": "fine-tuning", "strategy": {"ewc": {"fisher_samples": 4}}, "category": "Regularization"},
    "ER": {"method": "fine-tuning", "strategy": {"er": {"memory_size": 6}}, "category": "Replay"},
    "Joint": {"method": "fine-tuning", "strategy": "joint"},
    "CODA": {
        "method": "coda",
        "preset": "official",
        "adapter": {"components_per_task": 2, "prompt_length": 4, "layers": [0]},
    },
    "Frozen": {"method": "frozen", "adapter": {"head_layers": 1}},
}


@pytest.fixture
def suite(place, tmp_path):  # noqa: F811
    """A suite as a mapping, and a function that writes it and gives it to the command."""

    class Suite(dict):
        folder = tmp_path / "out"

        def run(self, *words: str) -> int:
            path = tmp_path / "suite.yaml"
            path.write_text(yaml.safe_dump(dict(self), sort_keys=False))
            return main(["compare", str(path), *words])

    return Suite(
        title="Colours",
        output_dir=str(tmp_path / "out"),
        defaults={
            "model": str(place / "model"),
            "dataset": str(place / "data"),
            "scenario": {"num_tasks": 2},
            "training": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": 8,
                "use_cpu": True,
                "disable_tqdm": True,
                "pictures": False,
            },
        },
        methods={name: METHODS[name] for name in ("Fine-tuning", "Joint")},
        reference="Joint",
        tables=[
            {
                "title": "Class-incremental",
                "columns": ["average-accuracy", "first-task", "forgetting", "intransigence", "parameters", "category"],
            }
        ],
    )


def told(capsys) -> str:
    found = capsys.readouterr()
    return found.err.strip().splitlines()[-1]


# --------------------------------------------------------------------------------------------------- a suite runs


def test_a_suite_from_nothing_to_its_page(suite, capsys):
    """Runs are plain runs of `peft-cl train`; what is finished is not repeated."""
    suite["published"] = [{"method": "L2P", "source": "a|paper", "values": {"average-accuracy": 83.83}}]
    assert suite.run("--jobs", "2") == 0
    printed = capsys.readouterr().out
    runs = {name: RunResults.load(suite.folder / "runs" / name / "seed0") for name in ("fine-tuning", "joint")}
    line = next(line for line in printed.splitlines() if line.startswith("| Fine-tuning"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    own, joint = runs["fine-tuning"], runs["joint"]
    assert cells[1] == f"{100 * own.metrics['average_accuracy']:.2f}"
    assert cells[2] == f"{100 * own.accuracy_matrix[0][0]:.2f} → {100 * own.accuracy_matrix[1][0]:.2f}"
    assert cells[4] == f"{100 * own.intransigence(joint):.2f}".removeprefix("-") or float(cells[4]) < 0
    assert cells[6] == "Naive"
    assert "| L2P (published: a\\|paper) | 83.83 |" in printed
    with open(suite.folder / "runs.csv") as file:
        lines = list(csv.DictReader(file))
    assert [float(each["average-accuracy"]) for each in lines] == [
        runs[name].metrics["average_accuracy"] for name in ("fine-tuning", "joint")
    ]
    report = json.loads((suite.folder / "report.json").read_text())
    assert report["tables"][0]["rows"][0][0]["text"] == "Fine-tuning"
    page = (suite.folder / "report.html").read_text()
    assert '<td class="label">Fine-tuning</td>' in page and "data:image/svg+xml;base64," in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    # Each run can be had again by the command of its file alone.
    written = yaml.safe_load((suite.folder / "runs" / "joint" / "seed0.yaml").read_text())
    assert written["strategy"] == "joint" and written["training"]["seed"] == written["scenario"]["seed"] == 0
    before = (suite.folder / "runs" / "joint" / "seed0" / "results.json").stat().st_mtime_ns
    assert suite.run() == 0
    assert (suite.folder / "runs" / "joint" / "seed0" / "results.json").stat().st_mtime_ns == before
    suite["defaults"]["training"]["num_train_epochs"] = 2
    assert suite.run() == 2
    assert "with other settings (training). Put them back" in told(capsys)


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(suite, capsys):
    suite["methods"]["Broken"] = {"method": "fine-tuning", "training": {"learning_rate": 1e30, "logging_steps": 1}}
    del suite["methods"]["Joint"], suite["reference"]
    # What only the disk refuses is not found by looking at the settings.
    blocked = suite.folder / "runs" / "broken"
    blocked.mkdir(parents=True)
    (blocked / "seed0").write_text("in the way")
    assert suite.run() == 1
    printed = capsys.readouterr().out
    assert f"Failed: Broken, seed 0; see {blocked / 'seed0.log'}" in printed
    assert "nothing that is learnt could be kept" in (blocked / "seed0.log").read_text()
    assert "Not complete: Broken has 0 of 1 run." in printed and "| Fine-tuning |" in printed
    assert "Broken, seed 0 failed" in (suite.folder / "report.html").read_text()


@pytest.mark.slow
def test_a_suite_that_was_killed_gives_the_same_table(suite, capsys, tmp_path):
    """Six methods, two seeds: killed three times with all its processes, and alone, it ends with the same digits."""
    suite["methods"], suite["seeds"] = METHODS, [0, 1]
    assert suite.run("--jobs", "2", "--quiet") == 0
    whole = capsys.readouterr().out.splitlines()
    suite["output_dir"] = str(tmp_path / "killed")
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(dict(suite), sort_keys=False))
    words = [sys.executable, "-m", "peft_cl.cli", "compare", str(tmp_path / "killed.yaml"), "--jobs", "2", "--quiet"]
    for with_its_runs in (True, False, True):
        process = subprocess.Popen(words, start_new_session=True)
        begun = time.monotonic()
        while time.monotonic() - begun < 25 and process.poll() is None:
            time.sleep(1)
        process.kill()
        process.wait()
        if with_its_runs:
            _kill_runs(tmp_path / "killed")
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    # Times and memory are of the machine.
    tables = [[line for line in lines if line.startswith("|")] for lines in (whole, found)]
    assert tables[0] == tables[1] and len(tables[0]) > 14


@pytest.mark.slow
def test_a_request_to_end_ends_the_runs(suite, tmp_path):
    suite["defaults"]["training"]["num_train_epochs"] = 100000
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(dict(suite)))
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_cl.cli", "compare", str(tmp_path / "suite.yaml"), "--quiet"]
    )
    log = suite.folder / "runs" / "fine-tuning" / "seed0.log"
    begun = time.monotonic()
    while not (log.is_file() and log.stat().st_size) and time.monotonic() - begun < 120:
        time.sleep(0.5)
    process.terminate()
    assert process.wait(60) == 130
    assert not _runs_in(suite.folder)


def _runs_in(folder: Path) -> list[int]:
    """The processes of runs in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and "train" in words:
            found.append(int(process.name))
    return found


def _kill_runs(folder: Path) -> None:
    for process in _runs_in(folder):
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_jobs_of_submitit(suite, capsys):
    pytest.importorskip("submitit", reason="submitit is in the extra slurm")
    assert suite.run("--launcher", "submitit", "--jobs", "2") == 0
    assert "| Fine-tuning |" in capsys.readouterr().out
    assert list((suite.folder / "jobs").glob("*_log.out"))


# --------------------------------------------------------------------------------------------------- rows and tables


def test_rows_are_every_combination(suite):
    suite["methods"] = {
        "L2P": {"method": "l2p", "adapter": {"top_k": 2}},
        "Frozen": {"method": "frozen", "settings": {}},
    }
    suite["settings"] = {"adapter.pool_size": [5, 10], "training.learning_rate": [1e-3, 1e-2]}
    del suite["reference"]
    found = read_suite(suite)
    assert [row.folder for row in found.rows] == [
        "l2p_pool-size-5_learning-rate-0.001",
        "l2p_pool-size-5_learning-rate-0.01",
        "l2p_pool-size-10_learning-rate-0.001",
        "l2p_pool-size-10_learning-rate-0.01",
        "frozen",
    ]
    assert found.rows[1].config["adapter"] == {"top_k": 2, "pool_size": 5}
    assert found.rows[1].config["training"]["learning_rate"] == 1e-2
    assert found.rows[1].config["training"]["num_train_epochs"] == 1
    assert suite["defaults"]["training"].get("learning_rate") is None


def test_operations_are_counted_where_a_table_shows_them(suite):
    assert "count_flops" not in read_suite(suite).rows[0].config["training"]
    suite["tables"][0]["columns"] += ["relative-flops"]
    assert read_suite(suite).rows[0].config["training"]["count_flops"] is True


@pytest.mark.slow
def test_a_setting_may_be_columns(suite, capsys):
    suite["methods"] = {"Fine-tuning": METHODS["Fine-tuning"]}
    suite["settings"] = {"scenario.kind": ["task-incremental", "class-incremental"]}
    suite["tables"] = [
        {
            "columns": ["average-accuracy"],
            "across": "scenario.kind",
            "titles": {"task-incremental": "Task-Incr", "class-incremental": "Class-Incr"},
        }
    ]
    del suite["reference"]
    assert suite.run("--jobs", "2") == 0
    printed = capsys.readouterr().out
    assert "| Method | Task-Incr | Class-Incr |" in printed
    values = [
        RunResults.load(suite.folder / "runs" / f"fine-tuning_kind-{kind}-incremental" / "seed0").metrics
        for kind in ("task", "class")
    ]
    told_values = " | ".join(f"{100 * each['average_accuracy']:.2f}" for each in values)
    assert f"| Fine-tuning | {told_values} |" in printed


# --------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metods": {}}, "There is no setting suite.metods. Did you mean suite.methods?"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"A": {"method": "l3p"}}, "reference": None}, "A: There is no method l3p. Did you mean l2p?"),
        (
            {"methods": {"A": {"method": "fine-tuning", "strategy": "gemm"}}, "reference": None},
            "A: There is no setting strategy.gemm. Did you mean strategy.gem?",
        ),
        (
            {"methods": {"A": {"method": "fine-tuning", "strategy": {"er": {"memory_size": 0}}}}, "reference": None},
            "A: strategy is wrong: memory_size is 0, but must be a whole number of at least 1",
        ),
        (
            {"methods": {"A b": METHODS["Joint"], "a-b": METHODS["Joint"]}, "reference": None},
            "'A b' and 'a-b' would both be in the folder 'a-b'",
        ),
        ({"reference": "Join"}, "There is no method for reference Join. Did you mean Joint?"),
        ({"tables": [{"columns": ["acuracy"]}]}, "There is no column acuracy"),
        ({"tables": [{"columns": []}]}, "columns is empty"),
        ({"tables": [{"columns": ["forgetting"], "methods": ["EWC"]}]}, "There is no method in tables EWC"),
        ({"tables": [{"columns": ["forgetting"], "across": "scenario.kind"}]}, "There is no setting for across"),
        ({"seeds": []}, "seeds is [], but must be different whole numbers"),
        ({"seeds": [1, 1]}, "seeds is [1, 1], but must be different whole numbers"),
        ({"settings": {"adapter.top_k": 5}}, "settings.adapter.top_k is 5, but must be a list of values"),
        ({"settings": {"adaptor.top_k": [5]}}, "There is no section for settings adaptor. Did you mean adapter?"),
        ({"published": [{"method": "A", "source": "b", "values": {"forgeting": 1}}]}, "There is no column forgeting"),
        (
            {"methods": {"PackNet": {"method": "fine-tuning", "strategy": "packnet"}}, "reference": None},
            "PackNet: it cannot be set up: ",
        ),
    ],
)
def test_faults_are_told_before_the_first_run(suite, change, message, capsys):
    suite.update({name: value for name, value in change.items() if value is not None})
    for name, value in change.items():
        if value is None:
            del suite[name]
    assert suite.run() == 2
    assert message in told(capsys)
    assert not suite.folder.exists()


def test_checking_runs_nothing(suite, capsys):
    assert suite.run("--check") == 0
    assert "2 runs of 2 rows: nothing wrong was found." in capsys.readouterr().out
    assert not suite.folder.exists()
    assert suite.run("--tables") == 2
    assert "No run of the suite" in told(capsys)


def test_settings_on_the_command_line(suite, capsys):
    assert suite.run("--set", "defaults.training.num_train_epochs=oops", "--check") == 2
    assert "training.num_train_epochs is 'oops'" in told(capsys)
    assert suite.run("--set", "seeds", "--check") == 2
    assert "--set is 'seeds', but must be NAME=VALUE" in told(capsys)
    assert suite.run("--launcher-option", "slurm_partition=gpu") == 2
    assert "--launcher-option slurm_partition is for a cluster" in told(capsys)
    assert suite.run("--jobs", "0") == 2
    assert "--jobs is 0, but must be a whole number of at least 1" in told(capsys)
