"""The pictures of a run and of several: which there are, and what they are drawn from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..disk import read_json
from ..metrics import RunResults
from ..reliability.calibration import Calibration
from ..tuners.base.saved import part_of_pool, read_header
from .comparison import plot_comparison
from .curves import plot_curves
from .keys import plot_key_similarity
from .matrix import plot_accuracy_matrix
from .reliability import plot_reliability
from .style import short_name
from .usage import plot_prompt_usage


MATRIX_FILE, CURVES_FILE = "accuracy_matrix.png", "curves.png"
USAGE_FILE, KEYS_FILE, RELIABILITY_FILE = "prompt_usage.png", "key_similarity.png", "reliability.png"
PROMPTS_FILE = "prompt_similarity.png"
#: All that `write_pictures` may write.
PICTURE_FILES = (MATRIX_FILE, CURVES_FILE, USAGE_FILE, KEYS_FILE, PROMPTS_FILE, RELIABILITY_FILE)
#: Cosines that a picture of keys or prompts may have: each is computed, and several times held in memory.
MOST_COSINES = 2 * 10**7
COMPARISON_FILE, COMPARISON_CURVES_FILE = "comparison.png", "comparison_curves.png"


@dataclass(frozen=True)
class Rows:
    """The keys or the prompts of an adapter.

    Attributes:
        values: (sets, rows, numbers of a row), rows of past tasks first.
        rows_of_tasks: Number of rows that each task brought; `None` where no row belongs to a task.
        set_names: Name of each set.
    """

    values: np.ndarray
    rows_of_tasks: list[int] | None
    set_names: list[str]


def write_pictures(folder: Path, results: RunResults, output: Path | None = None) -> list[Path]:
    """Draw a run: the accuracy matrix, the curves, the prompt usage if counted, how alike the adapter's keys and its
    prompts are if it has some, and the reliability diagrams if a temperature was fitted after the last task.

    Args:
        folder: The run's folder; its adapter is read where there is one.
        results: The record of the run.
        output: Where to write. `None`: into the run's folder.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The adapter in the folder is damaged.
        OSError: The pictures cannot be written.
    """
    similar = [(KEYS_FILE, "key", read_rows(folder, "keys")), (PROMPTS_FILE, "prompt", read_rows(folder, "prompts"))]
    output = folder if output is None else output
    files = [output / MATRIX_FILE, output / CURVES_FILE]
    plot_accuracy_matrix(results, path=files[0])
    plot_curves([results], path=files[1])
    if results.prompt_usage is not None:
        files.append(output / USAGE_FILE)
        plot_prompt_usage(results, path=files[-1])
    for file, what, rows in similar:  # read before anything is written
        if rows is not None:
            files.append(output / file)
            heading = f"{results.method}: {what} similarity"
            own_rows = rows.rows_of_tasks is not None and len(rows.rows_of_tasks) == len(results.task_names)
            names = results.task_names if own_rows else None
            plot_key_similarity(rows.values, rows.rows_of_tasks, rows.set_names, heading, files[-1], names)
    if results.calibration and results.calibration[-1]:
        files.append(output / RELIABILITY_FILE)
        heading = f"{results.method} on {short_name(results.dataset)}: reliability"
        plot_reliability(Calibration.from_dict(results.calibration[-1]), heading, files[-1])
    return files


def write_comparison(output: Path, list_of_results: Sequence[RunResults]) -> list[Path]:
    """Draw several runs side by side: with their matrices, and their curves of average accuracy and forgetting.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Two runs have the same method, data, backbone and seed.
        OSError: The pictures cannot be written.
    """
    files = [output / COMPARISON_FILE, output / COMPARISON_CURVES_FILE]
    plot_comparison(list_of_results, path=files[0])
    plot_curves(list_of_results, path=files[1])
    return files


def read_rows(folder: Path, name: str = "keys") -> Rows | None:
    """Read the `"keys"` or `"prompts"` of the adapter in a folder; `None` if there is no adapter, or none of them.

    PEFT saves an adapter that is not named "default" into a folder of its name.

    Raises:
        ValueError: The weight file or the configuration beside it is damaged.
    """
    named = sorted(path.parent for path in folder.glob(f"[!_.]*/{SAFETENSORS_WEIGHTS_NAME}"))
    folder = next((each for each in (folder, *named) if (each / SAFETENSORS_WEIGHTS_NAME).is_file()), None)
    if folder is None:
        return None
    try:
        config = folder / CONFIG_NAME
        facts = read_json(config) if config.is_file() else {}
        layers, grown = facts.get("layers"), facts.get("grown")
        tensors = _tensors(folder / SAFETENSORS_WEIGHTS_NAME, name)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The {name} of the adapter in {str(folder)!r} cannot be read: {error}") from error
    if name not in tensors:
        return None
    past = tensors.get(f"past_{name}")
    values = tensors[name] if past is None else torch.cat([past, tensors[name]], dim=-2)
    sets, rows = values.shape[:2]
    if sets * rows * rows > MOST_COSINES:
        warnings.warn(
            f"{sets} sets of {rows} {name} are too many to draw the cosine of each two, so there is no picture of "
            "them.",
            stacklevel=2,
        )
        return None
    rows_of_tasks = None
    if past is not None and not grown:  # each task brought as many rows
        new = tensors[name].shape[-2]
        rows_of_tasks = [new] * (rows // new) if rows % new == 0 else None
    is_by_layer = isinstance(layers, list) and len(layers) == sets
    names = [f"layer {layer}" for layer in layers] if is_by_layer else [f"set {index}" for index in range(sets)]
    return Rows(values.numpy(), rows_of_tasks, names)


def _tensors(file: Path, name: str) -> dict[str, torch.Tensor]:
    """The rows of a pool in an adapter's weight file, `name` and, of some methods, `past_<name>`, each flattened.

    Raises:
        ValueError: they have other shapes, or numbers that are none; told from the header where that will do.
    """
    found = {}
    for key, stored in read_header(file).items():
        if (part := part_of_pool(key)) in (name, f"past_{name}"):
            found[part] = key, stored.shape
    # Keys are (sets, rows, D); prompts (layers, rows, L, D), or (layers, 2, rows, L, D) with keys and values apart.
    dimensions, axis = ((3,), -2) if name == "keys" else ((4, 5), -3)
    sizes = {
        part: (*shape[:axis], *shape[axis:][1:]) if len(shape) in dimensions else None
        for part, (_, shape) in found.items()
    }
    has_rows = name not in found or 0 not in found[name][1]
    if None in sizes.values() or len(set(sizes.values())) > 1 or not has_rows:
        shapes = ", ".join(f"{part} {shape}" for part, (_, shape) in found.items())
        raise ValueError(
            f"they have the shapes {shapes}, but must be "
            f"{'(sets, rows, D)' if name == 'keys' else '(layers, rows, L, D)'} alike. Restore the file."
        )
    with safe_open(file, framework="pt") as weights:
        return {part: _flat(weights.get_tensor(key).float()) for part, (key, _) in found.items()}


def _flat(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a pool as one vector each, (sets, rows, numbers)."""
    if rows.ndim == 5:
        rows = rows.transpose(1, 2)
    return rows.flatten(2)
