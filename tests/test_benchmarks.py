"""The benchmarks run as their first lines say, and print and write what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("growth", ["--tasks", "10", "20", "--repeats", "1"], 8),
        ("trainer_share", ["--batch-size", "4", "--steps", "2"], 2),
        ("sequence_time", ["--backbone", "vit-tiny-64", "--tasks", "2", "--images", "1", "--methods", "coda"], 1),
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
