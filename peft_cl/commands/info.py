"""`peft-cl info`: what an adapter's folder says about it, without its base model."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..heads.files import SUMS_FILE
from ..hub.sources import find_source
from ..metrics import RunResults, results_table
from ..text import counted
from .adapters import SavedAdapter
from .errors import explained
from .output import say, say_json
from .sources import RESULTS_FILE, WEIGHTS_FILE, adapter_folder, load_config, load_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")


def run(arguments: argparse.Namespace) -> None:
    facts = read_facts(adapter_folder(arguments.adapter))
    if arguments.json:
        say_json(facts)
    else:
        say(as_text(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read an adapter's facts, in types that JSON knows.

    Raises:
        CommandError: A file is missing or damaged, or the adapter is of another library.
    """
    config = load_config(folder)
    with explained(f"The adapter in {str(folder)!r} cannot be read"):
        parts = parameters_by_part(folder / WEIGHTS_FILE)
    results = load_results(folder)
    return {
        "folder": str(folder),
        "method": results.method if results else config.method,
        "peft_type": config.peft_type.value,
        "base_model": find_source(config.base_model_name_or_path or "").name,
        "task_names": list(SavedAdapter(str(folder), folder, config, results).task_names or ()),
        "tasks": [[config.classes[row] for row in rows] for rows in config.tasks or ()],
        "rows_in_use": config.rows_in_use,
        "parameters": {name: {"shapes": shapes, "count": sum(map(prod, shapes))} for name, shapes in parts.items()},
        "head": {"name": config.head, "options": config.head_options, "features": config.head_features},
        "file_bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "sums_bytes": (folder / SUMS_FILE).stat().st_size if (folder / SUMS_FILE).is_file() else None,
        "results": json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")) if results else None,
    }


def parameters_by_part(file: Path) -> dict[str, list[list[int]]]:
    """Shapes of the tensors in a weight file by the adapter's part: `prompts`, `keys`, ..., `head`.

    Rows of past tasks are kept in tensors of their own, `past_prompts` beside `prompts`: they are one part.
    """
    parts = defaultdict(list)
    with safe_open(file, framework="pt") as weights:
        for key in weights.keys():
            place, _, name = key.rpartition(".")
            part = "head" if "_head" in place else key.partition("_pool.")[2].split(".")[0]
            parts[(part or name).removeprefix("past_")].append(list(weights.get_slice(key).get_shape()))
    return dict(sorted(parts.items()))


def as_text(facts: dict[str, Any]) -> str:
    classes = sum(map(len, facts["tasks"]))
    names = facts["task_names"] or [f"task_{index}" for index in range(len(facts["tasks"]))]
    total = sum(part["count"] for part in facts["parameters"].values())
    lines = [
        f"{'method:':<15}{facts['method']} ({facts['peft_type']})",
        f"{'base model:':<15}{facts['base_model'] or 'not named'}",
        f"{'tasks:':<15}{len(facts['tasks'])} with {counted(classes, 'class')}",
        *(f"{f'  {name}:':<15}{', '.join(classes)}" for name, classes in zip(names, facts["tasks"], strict=True)),
        f"{'rows in use:':<15}{facts['rows_in_use']}",
        f"{'head:':<15}{facts['head']['name']}" + "".join(f", {k} {v}" for k, v in facts["head"]["options"].items()),
        f"{'parameters:':<15}{total:,}",
    ]
    for name, part in facts["parameters"].items():
        shapes = " + ".join(" x ".join(map(str, shape)) for shape in part["shapes"] if prod(shape))
        lines.append(f"{f'  {name}:':<15}{part['count']:>10,}  ({shapes or 'empty'})")
    lines.append(f"{'file:':<15}{facts['file_bytes']:,} bytes")
    if facts["sums_bytes"]:
        lines.append(f"{'sums:':<15}{facts['sums_bytes']:,} bytes, wanted to learn on")
    if not facts["results"]:
        return "\n".join([*lines, "results:       none beside the adapter"])
    results = RunResults.load(facts["folder"])
    lines += [f"{'trained on:':<15}{results.dataset}, seed {results.seed}", "", results_table([results])]
    return "\n".join(lines)
