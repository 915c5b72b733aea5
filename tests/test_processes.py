"""Two processes learn what one learns with the same total batch. Real processes, started as `torchrun` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


PROCESS = Path(__file__).with_name("sequence_process.py")


@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda+cached", "probe+finetuning+ewc", "l2p+augmented"])
def test_two_processes_equal_one(method, tmp_path):
    """Measured once before anything is trained, which would switch DDP off; growth between tasks included.

    The third has parameters that most steps leave without a gradient and processes that write the same files of
    queries, the last one augmented images.
    """
    words = [str(PROCESS), str(tmp_path / "one"), method, "0", "anew"]
    environment = {**os.environ, "PLAIN": "1", "EVALUATE_FIRST": "1", "OMP_NUM_THREADS": "1"}
    one = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment)
    assert one.stdout.splitlines()[-1:] == ["processes 1"], one.stderr
    words[1] = str(tmp_path / "two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=300, env=environment)
    assert two.stdout.splitlines()[-1:] == ["processes 2"], two.stderr
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        difference = (tensor - expected[name]).abs().max().item()
        assert difference <= 1e-4 + 1e-3 * expected[name].abs().max().item(), f"{name} differs by {difference}"
    records = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert records[0]["accuracy_matrix"] == records[1]["accuracy_matrix"]
