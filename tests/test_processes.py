"""Two processes learn what one learns with the same total batch. Real processes, started as `torchrun` does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_cl.trainer.snapshot import FILE, PREVIOUS


PROCESS = Path(__file__).with_name("sequence_process.py")


def run(
    processes: int,
    folder: Path,
    method: str,
    resume: bool = False,
    launcher: tuple[str, ...] = (),
    **environment: str,
) -> None:
    words = [str(PROCESS), str(folder), method, "0", "resume" if resume else "anew"]
    if processes > 1:
        words = [*(launcher or ("torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))), *words]
        words.insert(0, "-m")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.splitlines()[-1:] == [f"processes {processes}"], done.stderr


def check_same(found: Path, expected: Path, absolute: float, relative: float) -> None:
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (found, expected)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        if not tensor.numel():
            continue
        tensor, expected_tensor = tensor.double(), adapters[1][name].double()
        difference = (tensor - expected_tensor).abs().max().item()
        assert difference <= absolute + relative * expected_tensor.abs().max().item(), f"{name}: {difference}"
    counts = torch.load(expected / "counts-0.pt")
    for file in found.glob("counts-*.pt"):  # of every process
        torch.testing.assert_close(torch.load(file), counts, atol=absolute, rtol=relative)
    records = [json.loads((folder / "results.json").read_text()) for folder in (found, expected)]
    assert records[0]["accuracy_matrix"] == records[1]["accuracy_matrix"]


@pytest.mark.parametrize(
    "method",
    [
        "l2p+uneven",
        "coda+uneven+accumulated",
        "probe+lda+uneven",
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (
                "probe+finetuning+ewc",
                "dualprompt+stream+unmasked",
                "coda+sharded+uneven",
                "l2p+lda+sharded",
                "l2p",
                "dualprompt",
                "dualprompt+bykey+adaptive",
                "l2p+growing+uneven",
                "coda+shared+adaptive+uneven",
                "coda+cached",
                "l2p+augmented",
                "l2p+er+uneven",
                "probe+er",
                "probe+ridge+stream+uneven",
                "coda+lda+drift+uneven",
                "dualprompt+fusion+stream+unmasked+uneven",
                "l2p+aligned+first+uneven",
            )
        ),
    ],
)
def test_two_processes_equal_one(method, tmp_path):
    """Measured once before anything is trained, which would switch DDP off; growth between tasks included.

    DualPrompt has parameters that most steps leave without a gradient. Where tasks are uneven, one process has fewer
    examples of the last batch, or none. The stream is not masked to the classes in the batch: each process has one.
    """
    for processes, folder in ((1, "one"), (2, "two")):
        run(processes, tmp_path / folder, method, PLAIN="1", EVALUATE_FIRST="1")
    check_same(tmp_path / "two", tmp_path / "one", 1e-4, 1e-3)


@pytest.mark.parametrize("method", [pytest.param("l2p+checkpoints", marks=pytest.mark.slow), "l2p+checkpoints+uneven"])
def test_two_processes_go_on_from_a_checkpoint_with_the_counts_of_both(method, tmp_path):
    """L2P counts the rows it chose, task evidence averages queries, each process for itself until a task's end."""
    run(2, tmp_path / "whole", method)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    state = tmp_path / "resumed" / "_state"
    os.replace(state / PREVIOUS, state / FILE)  # two of three tasks are finished
    shutil.rmtree(state / "task_2" / "checkpoint-6")  # that of step 4 lies within an epoch of 3 steps
    run(2, tmp_path / "resumed", method, resume=True)
    check_same(tmp_path / "resumed", tmp_path / "whole", 1e-6, 0)


def test_accelerate_launches_two_processes(tmp_path):
    run(1, tmp_path / "one", "l2p+uneven", PLAIN="1", EVALUATE_FIRST="1")
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    environment = {"PLAIN": "1", "EVALUATE_FIRST": "1", "ACCELERATE_USE_CPU": "1"}
    run(2, tmp_path / "two", "l2p+uneven", launcher=launcher, **environment)
    check_same(tmp_path / "two", tmp_path / "one", 1e-4, 1e-3)


@pytest.mark.slow
def test_the_best_checkpoint_has_the_counts_of_both_processes_once(tmp_path):
    for processes, folder in ((1, "one"), (2, "two")):
        run(processes, tmp_path / folder, "l2p+checkpoints+best", PLAIN="1")
    check_same(tmp_path / "two", tmp_path / "one", 1e-4, 1e-3)
