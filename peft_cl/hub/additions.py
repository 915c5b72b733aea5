"""What a card says of what only some adapters have: parts that are not from the method's paper, own metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..metrics import RunResults
from ..metrics.own import means_over_tasks
from ..text import code, in_markdown


def head_added(results: RunResults, adapter: Mapping[str, Any]) -> list[str]:
    """What stands in the place of the paper's linear head, and what its sums are for."""
    name = adapter.get("head", "linear")
    if name == "linear":
        return []
    parts = [f"Not from the paper is the head, {code(name)} of `peft_cl.heads`"]
    if adapter.get("head_features"):
        seen, layers = in_markdown(adapter["head_features"]), in_markdown(adapter.get("head_layers", 1))
        parts.append(f", which sees {seen} of the last {layers} layers")
    if adapter.get("train_prompts") == "first_task":
        parts.append("; prompts were learnt in the first task and are frozen since")
    if results.sums_bytes:
        parts.append(
            f". The file `head_sums.safetensors` ({results.sums_bytes / 1e6:.1f} MB) holds the sums that it is "
            "computed from: they are wanted to learn on, to join adapters and to forget classes, not to predict"
        )
    return ["".join(parts) + "."]


def evidence_added(adapter: Mapping[str, Any]) -> list[str]:
    """What the papers do not have must not be taken for theirs."""
    weight = adapter.get("task_evidence")
    if not weight:
        return []
    return [
        f"Not from the paper is the task evidence: in evaluation, {weight:g} times the cosine of the query with each "
        "task's mean query is added to the logits of the task's classes. "
        '`model.peft_config["default"].task_evidence = 0` switches it off.'
    ]


def own_metrics_added(results: RunResults) -> list[str]:
    """The user's own metrics that are numbers; lists, such as a confusion matrix, are in the record."""
    means = means_over_tasks(results.own_metrics or {})
    if not means:
        return []
    header = ["Metric", "Mean", *map(in_markdown, results.task_names[: results.finished_tasks])]
    rows = [[in_markdown(name), *map(_number, [mean, *results.own_metrics[name]])] for name, mean in means.items()]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, f"|---|{'---:|' * (len(header) - 1)}")
    return [
        "### Other metrics",
        "Of functions that the run was given, on the test images of the task of the column, after the last task:",
        "\n".join(lines),
    ]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not measured"
