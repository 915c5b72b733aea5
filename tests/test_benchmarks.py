"""The benchmarks run as their first lines say, and print and write what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from peft_cl import ContinualTrainer
from peft_cl.commands.digits import load_digits_dataset


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("growth", ["--tasks", "10", "20", "--repeats", "1"], 8),
        ("search", ["--sizes", "100", "1000", "--queries", "20", "--repeats", "1"], 2),
        ("trainer_share", ["--batch-size", "4", "--steps", "2"], 2),
        ("sequence_time", ["--backbone", "vit-tiny-64", "--tasks", "2", "--images", "1", "--methods", "coda"], 1),
        (
            "reliability",
            ["--data", "digits", "--methods", "none", "--images-per-class", "4", "--held-out", "4"]
            + ["--test-images", "4", "--num-tasks", "2", "--seeds", "0", "--threads", "1", "--quiet"],
            1,
        ),
        ("storage", [*"--per-digit 4 --tasks 2 --epochs 1 --seeds 0 --methods coda --threads 1".split()], 3),
    ],
)
def test_a_benchmark_prints_and_writes_its_rows(script, options, rows, tmp_path):
    file = tmp_path / "rows.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, BENCHMARKS / f"{script}.py", *options, "--json", file],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(file.read_text())
    assert len(found) == rows
    assert len([line for line in run.stdout.splitlines() if line.startswith("| ")]) == rows + 1
    times = [value for row in found for name, value in row.items() if name.endswith(("seconds", "_ms"))]
    assert len(times) >= rows and all(value > 0 for value in times)


@pytest.mark.slow
def test_statistics_of_many_images_are_those_of_all_at_once(tmp_path):
    """The trial of ImageNet's size, with fewer images."""
    file = tmp_path / "scale.json"
    sizes = ["--classes", "20", "--images", "2000", "--test-images", "200", "--tasks", "10"]
    subprocess.run([sys.executable, BENCHMARKS / "scale.py", *sizes, "--quiet", "--json", file], check=True)
    found = json.loads(file.read_text())
    assert found["counts_are_exact"] and found["images"] == 2000 and found["tasks"] == 10
    assert max(found["means_off"], found["covariance_off"]) < 1e-9 and found["logits_off"] < 1e-3
    assert found["same_answers"] == 1 and found["accuracy"] > 0.9
    assert found["memory_end_mb"] < found["memory_early_mb"] + 50


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "coda", "coda-every"])
def test_heads_on_shared_features_are_those_of_the_trainer(method, tmp_path, monkeypatch):
    """What `heads.py` measures on features that it computes once is what a run of the trainer measures."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import head_features
    import heads as benchmark

    data = load_digits_dataset(per_digit=6)
    for split in data:
        data[split] = data[split].add_column("row", list(range(len(data[split]))))
    options = SimpleNamespace(
        **{"work": tmp_path / "work", "output": tmp_path, "attention": "eager", "epochs": 1, "quiet": True},
        **{"scenario": "class-incremental", "num_tasks": 5, "more_tasks": [10], "holdout": None, "methods": [method]},
        **{"seeds": [0], "rows": [benchmark.Row("lda"), benchmark.Row("ncm", {"metric": "cosine"}, "cls", 1)]},
    )
    benchmark.run(method, 0, data, options)
    record = json.loads((tmp_path / f"{method}-seed0.json").read_text())
    found = record["rows"]["lda (cls+mean of 6 layers)"]
    trainer = head_features.learn_prompts(method, 0, data, options, kind=ContinualTrainer)
    trainer.train()
    measured = np.array([[np.nan if value is None else value for value in row] for row in found["matrix"]])
    known = ~np.isnan(measured)
    assert known[-1].all() and (method == "coda-every" or known.sum() == 15)
    np.testing.assert_allclose(measured[known], trainer.accuracy_matrix[known], atol=1e-6)
    assert found["sums_bytes"] > found["head_bytes"] > 0
    if method == "none":
        more = record["more_tasks"]["10"]["lda (cls+mean of 6 layers)"]["accuracy"]
        assert more == pytest.approx(found["accuracy"], abs=0.03)  # sizes of tasks differ, images do not


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_at_tiny_sizes(tmp_path):
    """All steps but the tests of the GPU: each leaves its record, and the table names it."""
    environment = {**os.environ, "TRIAL": "1", "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = BENCHMARKS / "on_gpu.sh"
    run = subprocess.run(["bash", script], capture_output=True, text=True, timeout=900, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = ("sequence_best", "step_cost", "latency", "trainer_share", "sequence_coda_20")
    for step in steps:
        assert f"| {step} |" in run.stdout and json.loads((tmp_path / f"{step}.json").read_text())
    assert run.stdout.count("| done |") == len(steps) + 1
    # A step that fails is named, and the others run all the same.
    broken = {
        **environment,
        "PYTHON": str(tmp_path / "python"),
        "OUT": str(tmp_path / "broken"),
        "STEPS": "tests latency",
    }
    wrapper = (
        f'#!/bin/sh\ncase "$1" in *latency.py) echo no such device >&2; exit 3;; esac\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").write_text(wrapper)
    (tmp_path / "python").chmod(0o755)
    run = subprocess.run(["bash", script], capture_output=True, text=True, timeout=480, env=broken)
    assert run.returncode == 1 and "failed: no such device" in run.stdout and run.stdout.count("| done |") == 1
