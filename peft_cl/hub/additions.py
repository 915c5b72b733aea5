"""What a card says of an adapter's parts that are not from its method's paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..metrics import RunResults
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
