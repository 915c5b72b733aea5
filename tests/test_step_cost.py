"""The step-cost benchmark: its rows are complete, and it refuses to time a step that is not what it says."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


TINY = ["--layers", "1", "--image-size", "32", "--batch-size", "2", "--repeats", "2", "--threads", "1"]


@pytest.fixture
def step_cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("step_cost")


@pytest.fixture
def steps(step_cost: ModuleType) -> ModuleType:
    return importlib.import_module("steps")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """The script sets the number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_writes_one_row_for_each_method_and_phase(
    step_cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    returned = step_cost.main([*TINY, "--json", str(tmp_path / "rows.json")])

    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == returned
    assert [(row["dtype"], row["method"], row["cached"], row["phase"]) for row in rows] == [
        (dtype, method, cached, phase)
        for dtype in ("float32", "bfloat16")
        for method in ("L2P", "DualPrompt", "CODA-Prompt")
        for cached in (False, True)
        for phase in ("train", "eval")
    ]
    for row in rows:
        assert (row["batch"], row["tasks"], row["attention"], row["device"]) == (2, 10, "sdpa", "cpu")
        assert row["images_per_second"] == 2 / row["seconds"] and row["speedup"] > 0
        assert row["share_of_most"] == row["products_per_second"] / row["most_products_per_second"] > 0
        assert row["memory_ratio"] == row["peak_memory_bytes"] / row["bare_peak_memory_bytes"]
        assert row["threads"] == 1
        assert row["torch"] == torch.__version__
        assert row["seconds"] > 0 and row["bare_seconds"] > 0
        assert min(row["ratios"]) <= row["ratio"] <= max(row["ratios"])
        assert len(row["ratios"]) == 2
        # One layer of ViT-B/16 has 7 million weights, and a step needs more than them.
        assert row["peak_memory_bytes"] > 7e6 * (4 if row["dtype"] == "float32" else 2)
    work = {(row["dtype"], row["method"], row["phase"], row["cached"]): row["products"] for row in rows}
    assert all(work[(*key, True)] < work[(*key, False)] for key in {key[:3] for key in work})
    # Five prompts of five tokens; the other methods prompt attention. CODA-Prompt holds ten components for each task.
    assert {row["method"]: row["extra_tokens"] for row in rows} == {"L2P": 25, "DualPrompt": 0, "CODA-Prompt": 0}
    assert {row["method"]: row["rows_in_use"] for row in rows}["CODA-Prompt"] == 100
    printed = capsys.readouterr().out
    assert all(f"{row['ratio']:.3f}" in printed for row in rows)


def test_layers_can_be_compiled(step_cost: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    rows = step_cost.main([*TINY, "--methods", "coda-prompt", "--dtype", "float32", "--compile", "aot_eager"])

    assert {row["compiled"] for row in rows} == {"aot_eager"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert "layers compiled by aot_eager" in capsys.readouterr().out


def test_methods_and_dtype_can_be_chosen(step_cost: ModuleType) -> None:
    rows = step_cost.main([*TINY, "--methods", "dualprompt", "--dtype", "bfloat16", "--tasks", "30"])

    assert {(row["method"], row["dtype"], row["tasks"]) for row in rows} == {("DualPrompt", "bfloat16", 30)}
    assert len(rows) == 4 and all(row["rows_in_use"] == 30 for row in rows)


def test_a_step_above_the_limit_is_a_failure(step_cost: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="Training steps above 0.01 times the bare model's passes: DualPrompt"):
        step_cost.main([*TINY, "--methods", "dualprompt", "--dtype", "float32", "--limit", "0.01"])
    assert "DualPrompt" in capsys.readouterr().out  # the table comes first


def test_a_backbone_weight_with_a_gradient_is_refused_by_name(steps: ModuleType) -> None:
    backbone = steps.build_backbone(1, 32, torch.float32)
    model = steps.build_method("dualprompt", backbone)
    pixel_values, labels = torch.randn(2, 3, 32, 32), torch.tensor([95, 99])
    step, _ = steps.method_steps(model, pixel_values, labels)
    step.seconds()  # frozen: accepted

    model.get_submodule("base_model.model.vit.base_layer.layers.0.mlp.fc1").weight.requires_grad_()

    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.fc1\.weight"):
        step.seconds()


def test_a_step_that_misses_a_weight_of_the_adapter_is_refused_by_name(steps: ModuleType) -> None:
    model = steps.build_method("l2p", steps.build_backbone(1, 32, torch.float32))

    with pytest.raises(AssertionError, match="keys"):
        steps.check_gradients(model)


def test_a_second_copy_of_the_backbone_is_refused(steps: ModuleType) -> None:
    backbone = steps.build_backbone(1, 32, torch.float32)
    model = steps.build_method("l2p", backbone)
    steps.check_one_backbone(model, backbone)

    model.base_model.model.query_encoder = copy.deepcopy(backbone.vit)

    with pytest.raises(AssertionError, match="one copy"):
        steps.check_one_backbone(model, backbone)


def test_peak_memory_counts_what_is_alive_together(steps: ModuleType) -> None:
    values = torch.zeros(1000)

    with steps.TensorMemory() as memory:
        first = values + 1
        second = first + 1
        del first
        third = second + 1
        view = third[:10]

    assert memory.peak == 2 * values.nbytes
    assert memory.now == 2 * values.nbytes
    assert view.untyped_storage().nbytes() == values.nbytes
