"""The model card of an adapter: the Hub's `README.md`, from the record of a run.

Every number on it comes from `RunResults`; nothing is filled in that was not measured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..disk import read_json, replacing
from ..metrics import RunResults, chance_level, results_table, standard_error
from ..metrics.chance import compared_without_prompts
from ..metrics.same_rows import same_rows
from ..plots.run import MATRIX_FILE
from ..text import code, in_markdown, percent, plain
from .additions import evidence_added, head_added, own_metrics_added
from .papers import PAPERS, Paper
from .parts import citation, classes_in_order, settings_of_method, table, table_row, tags
from .present_card import check_card
from .sources import Source, find_source, without_folders
from .terms import METRICS, SETTINGS
from .usage import PROCESSOR_FILES, UNNAMED, usage


def model_card(
    results: RunResults,
    config: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    *,
    adapter_id: str | None = None,
    has_processor: bool = False,
    has_picture: bool = False,
    license: str | None = None,
    limits: Sequence[str] = (),
    paper: Paper | None = None,
) -> str:
    """Make the model card of an adapter from the record of its run.

    A run that is not finished gives a card too, which says so at its top. A backbone or data set given as a local path
    appears by the name of its folder, and in the text alone: in the metadata the Hub would take it for one of its own.
    So do every local path in the command, and a backbone without a name (one made from a configuration).

    Args:
        results: The record of the run.
        config: The adapter's configuration (`adapter_config.json`), whose settings are listed. `None`: the one
            recorded in the hyperparameters, if it is there.
        base_model: Hub id or path of the backbone; `None`: that of the results.
        dataset: Hub id or path of the data set; `None`: that of the results.
        adapter_id: Hub id of the adapter, for the title of its results and the usage example.
        has_processor: Whether the adapter's folder has its own image processor; else the backbone's is used.
        has_picture: Whether the accuracy matrix is drawn beside the card (`accuracy_matrix.png`), which shows it then.
        license: The adapter's licence, an identifier of the Hub such as `"apache-2.0"`. `None`: none stated.
        limits: Further limits of the adapter, a sentence or two of Markdown each, such as the licence of the data
            that the backbone was trained on.
        paper: The method's paper; `None`: looked up by `results.peft_type`.

    Returns:
        `str`: the card, YAML metadata and Markdown.

    Example:
        ```python
        >>> results = RunResults.load("out/results.json")
        >>> print(model_card(results, adapter_id="user/coda-cifar100", license="apache-2.0"))
        ```
    """
    backbone = find_source(results.base_model if base_model is None else base_model)
    data = find_source(results.dataset if dataset is None else dataset)
    paper = paper or PAPERS.get(results.peft_type or "")
    parts = [
        f"---\n{_metadata(results, backbone, data, adapter_id, license).to_yaml()}\n---",
        _introduction(results, backbone, data, paper),
        usage(backbone, adapter_id or UNNAMED, has_processor),
        _measured(results, has_picture),
        _protocol(results, results.hyperparameters.get("adapter", {}) if config is None else config, backbone, data),
        _limits(results, data, limits),
        citation(paper),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_model_card(folder: str | Path, results: RunResults, **options: Any) -> Path:
    """Write the model card of the adapter in `folder` to its `README.md`, in place of one that is there.

    The configuration is read from the folder's `adapter_config.json` if it is there, the usage example takes the
    image processor from the folder if it holds one, and the picture of the accuracy matrix is shown if it lies there.

    Args:
        folder: The adapter's folder, made if missing.
        results: The record of the run.
        options: As `model_card` has them.

    Returns:
        `Path`: the file written.

    Raises:
        ValueError: The Hub would refuse the metadata, for instance a `license` that is no identifier. Nothing is
            written.

    Example:
        ```python
        >>> model.save_pretrained("out")
        >>> write_model_card("out", RunResults.load("out/results.json"), limits=["For research only."])
        PosixPath('out/README.md')
        ```
    """
    folder = Path(folder)
    config_file = folder / "adapter_config.json"
    if "config" not in options and config_file.is_file():
        try:
            options["config"] = read_json(config_file)
        except ValueError as error:  # the record says what the card needs
            warnings.warn(f"{error} The card is made without it.", stacklevel=2)
    options.setdefault("has_processor", any((folder / name).is_file() for name in PROCESSOR_FILES))
    options.setdefault("has_picture", (folder / MATRIX_FILE).is_file())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    text = model_card(results, **options)
    check_card(text)
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def _metadata(
    results: RunResults, backbone: Source, data: Source, adapter_id: str | None, license: str | None
) -> ModelCardData:
    scenario = results.scenario
    arguments = {
        "scenario": scenario.get("name"),
        "num_tasks": len(results.task_names),
        "finished_tasks": results.finished_tasks,
        "class_order_seed": scenario.get("seed"),
        "seed": results.seed,
    }
    eval_results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=data.hub_id or "unknown",
            dataset_name=plain(data.short_name) or "unknown",
            dataset_split=plain(_test_split(results)),
            dataset_args={name: _plain(value) for name, value in arguments.items() if value is not None},
            metric_type=METRICS[metric][0],
            metric_name=METRICS[metric][1],
            metric_value=round(results.metrics[metric], 6),
            verified=False,
        )
        for metric in METRICS
        if METRICS[metric][0] and math.isfinite(results.metrics.get(metric, math.nan))
    ]
    base_model = None if backbone.is_local else backbone.hub_id  # the Hub looks for it among its own
    name = plain(adapter_id.split("/")[-1]) if adapter_id else _title(results, data)
    return ModelCardData(
        license=license,
        library_name="peft",
        pipeline_tag="image-classification",
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        datasets=[data.hub_id] if data.hub_id and not data.is_local else None,
        metrics=["accuracy"] if eval_results else None,
        tags=tags(scenario.get("name"), *results.method.partition(" with ")[0].split(" + ")),
        model_name=name if eval_results else None,
        eval_results=eval_results or None,
    )


def _plain(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value


def _introduction(results: RunResults, backbone: Source, data: Source, paper: Paper | None) -> str:
    tasks, done = len(results.task_names), results.finished_tasks
    warning = f"> **This run is not finished**: {done} of {tasks} tasks are trained and evaluated."
    if done:
        warning += " The results below are of those tasks only."
    what = (
        f"An adapter for {backbone.link('backbone')}, trained by {in_markdown(results.method)} with `peft_cl` on "
        f"{_data_link(data)}, {tasks} task{'s' if tasks != 1 else ''} one after the other "
        f"({in_markdown(results.scenario.get('name', 'task sequence'))})."
    )
    before = results.hyperparameters.get("tasks_learnt_before")
    if before:
        what += f" Tasks learnt before: {in_markdown(before)}"
        last = results.accuracy_matrix[results.finished_tasks - 1] if results.finished_tasks else []
        is_whole = len(results.task_names) > before and all(map(math.isfinite, last[:before]))
        what += "." if is_whole else ", of which no figure below says how much was forgotten."
    method = (
        f"{paper.description} The method is from {paper.link}."
        if paper
        else f"{in_markdown(results.method)} has no paper on record here; what was trained is listed under Protocol."
    )
    head = [
        f"# {in_markdown(results.method)} on {_data_name(data, 'a data set without a name')}",
        *([warning] if done < tasks else []),
    ]
    adapter = results.hyperparameters.get("adapter", {})
    return "\n\n".join([*head, what, method, *head_added(results, adapter), *evidence_added(adapter)])


def _title(results: RunResults, data: Source) -> str:
    return plain(f"{results.method} on {data.short_name or 'a data set without a name'}")


def _data_name(data: Source, otherwise: str) -> str:
    return in_markdown(data.short_name) or otherwise


def _data_link(data: Source) -> str:
    return data.link("data set", path="datasets/")


def _measured(results: RunResults, has_picture: bool) -> str:
    done = results.finished_tasks
    if done == 0:
        return "## Results\n\nNothing is measured yet: no task is finished."
    lines = [
        f"- {METRICS[name][1] if name in METRICS else in_markdown(name)}: {_percent(value)}"
        + (f" ({METRICS[name][2]})" if name in METRICS else "")
        for name, value in results.metrics.items()
    ]
    if results.task_identification is not None:
        lines.append(
            f"- Task identification: {percent(results.task_identification, 2)} % (share of test images whose "
            "predicted class is one of their own task's)"
        )
    names = [in_markdown(name) for name in results.task_names[:done]]
    header = table_row(["After task", *names]) + "\n|---|" + "---:|" * done
    measured = list(zip(names, results.accuracy_matrix[:done], strict=True))
    if results.baseline is not None:
        measured.insert(0, ("(before the first)", results.baseline))
    rows = [
        table_row([name, *(_matrix_cell(value, i, j) for j, value in enumerate(row[:done]))])
        for i, (name, row) in enumerate(measured, start=done - len(measured))
    ]
    parts = [
        "## Results",
        f"Measured on the test examples, of one run with the seed {in_markdown(results.seed)}.",
        results_table([results]),
        "\n".join(lines),
        _compared(results),
        same_rows(results),
        "### Accuracy matrix",
        "Accuracy in % on the task of the column, after training on the task of the row:",
        "\n".join([header, *rows]),
        f"![The accuracy matrix as a picture]({MATRIX_FILE})" if has_picture else None,
        *own_metrics_added(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _percent(value: float) -> str:
    return f"{percent(value, 2)} %" if math.isfinite(value) else "not measured"


def _matrix_cell(value: float, row: int, column: int) -> str:
    if math.isfinite(value):
        return percent(value)
    return "not measured" if column <= row else ""  # tasks to come are seldom measured


def _compared(results: RunResults) -> str | None:
    """What the average accuracy has to be compared with, and what its test images leave open."""
    chance, error = chance_level(results), standard_error(results)
    if chance is None or error is None:
        return None
    return (
        f"Guessing among the classes gives {percent(chance)} %. The standard error of the final average accuracy, "
        f"from the number of test images alone, is {percent(error)} points."
        + (f" {in_markdown(row)}" if (row := compared_without_prompts(results)) else "")
    )


def _protocol(results: RunResults, config: Mapping[str, Any], backbone: Source, data: Source) -> str:
    scenario = results.scenario
    facts: dict[str, Any] = {
        "Backbone": backbone.link("backbone"),
        "Data": _data_link(data),
        "Scenario": in_markdown(scenario["name"]) if "name" in scenario else None,
        "Tasks": len(results.task_names),
        "Classes per task": _counts(scenario.get("classes_per_task")),
        "Training examples per task": _counts(scenario.get("train_sizes")),
        "Test examples per task": _counts(results.test_sizes),
        "Test examples from": in_markdown(_test_split(results)),
        "Class order": _class_order(scenario),
        "Seed": in_markdown(results.seed),
    }
    hyperparameters = dict(results.hyperparameters)
    # The Trainer's -1 stands for "as many as the epochs make"; a number takes the place of the epochs.
    steps = hyperparameters.get("max_steps", -1)
    if not isinstance(steps, list):  # of which each task had its own
        hyperparameters.pop("num_train_epochs" if steps > 0 else "max_steps", None)
    given = {name: _over_tasks(hyperparameters.get(setting)) for setting, name in SETTINGS.items()}
    facts |= {name: in_markdown(value, 300) for name, value in given.items() if value is not None}
    facts["Trainable parameters"] = f"{results.trainable_parameters:,} of {results.total_parameters:,}"
    facts["Command"] = code(without_folders(results.command[:5000]), 2000) if results.command else None
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    facts["Versions"] = in_markdown(versions, 500) or None
    parts = [
        "## Protocol",
        table(("", ""), {name: value for name, value in facts.items() if value is not None}),
        *settings_of_method(config),
        *classes_in_order(scenario.get("class_order")),
    ]
    return "\n\n".join(parts)


def _test_split(results: RunResults) -> str:
    """Name of the split measured on, or how it was divided off."""
    data = results.hyperparameters.get("data", {})
    if data.get("test_fraction"):
        return f"{data['test_fraction']:.0%} of {data['train_split']}, drawn with seed {data['split_seed']}"
    return data.get("test_split", "test")


def _counts(values: Sequence[int] | None) -> str | None:
    """One number where all tasks have the same, else all of them."""
    if not values:
        return None
    texts = [f"{value:,}" if value else "not known" for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def _over_tasks(value: Any) -> Any:
    """A setting as text: one that was another in some of the tasks has a value for each of them."""
    if not isinstance(value, list):
        return value
    return ", ".join("not known" if each is None else str(each) for each in value) + " (task by task)"


def _class_order(scenario: Mapping[str, Any]) -> str | None:
    if "class_order" not in scenario:
        return None
    if scenario.get("seed") is None:
        return "given, or the data set's own"
    return f"drawn with the seed {in_markdown(scenario['seed'])}"


def _limits(results: RunResults, data: Source, limits: Sequence[str]) -> str:
    classes = results.scenario.get("class_order")
    known = f"the {len(classes)} classes it was trained on" if classes else "the classes it was trained on"
    if results.finished_tasks < len(results.task_names):
        known = "the classes of the tasks finished"
    points = [
        f"It knows {known} and nothing else: every other image is given one of them as well.",
        f"The results are of the test split of {_data_name(data, 'its data set')}; other images may differ much.",
        *limits,
    ]
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)
