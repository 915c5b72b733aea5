"""Spaces of the Hub: the page of an adapter, and the metrics for `evaluate.load`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo

from ..metrics import MODULE
from ..text import literal
from ..version import __version__
from .pushing import check_name, commit_files
from .shared_files import Files


#: Name of the metrics on the Hub, behind that of their owner; `evaluate` looks for a file of this name in the Space.
METRICS_NAME = Path(MODULE).name
METRICS_APP = """\
import csv

import gradio as gr
from continual_learning import ContinualLearning


COLUMNS = ("predictions", "references", "task_ids", "steps")
METRIC = ContinualLearning()


def measure(file):
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return METRIC.compute(**{name: [float(row[name]) for row in rows] for name in COLUMNS})
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise gr.Error(f"The table cannot be measured: {error}")


page = gr.Interface(
    measure,
    gr.File(label=f"Table (CSV) with the columns {', '.join(COLUMNS)}", file_types=[".csv"]),
    gr.JSON(label="Metrics"),
    title="Metrics of continual learning",
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
"""
METRICS_TEXT = """\
# Metrics of continual learning

Of a model that learns one task after the other, from its predictions on the test examples of all tasks seen, made
after each task: final average accuracy, average incremental accuracy, forgetting, backward transfer and more.

```python
import evaluate

metric = evaluate.load("{name}")
rows = {{"predictions": [0, 0, 1], "references": [0, 0, 1], "task_ids": [0, 0, 1], "steps": [0, 1, 1]}}
print(metric.compute(**rows)["average_accuracy"])
```

It needs `pip install peft-cl`. `metric.inputs_description` says what it takes and returns.
"""


def push_metrics(owner: str, *, private: bool = False, token: str | None = None) -> CommitInfo:
    """Push the metrics of continual learning as a Space, `OWNER/continual_learning`, which `evaluate.load` takes.

    Args:
        owner: A user or an organisation on the Hub.
        private: Make the Space private.
        token: A token with the right to write. `None`: that of `hf auth login`, or `HF_TOKEN`.

    Raises:
        ValueError: `owner` is no name on the Hub.
        HubError: The Hub, or the way to it, refused something.

    Example:
        ```python
        >>> push_metrics("user")
        >>> evaluate.load("user/continual_learning")
        ```
    """
    name = f"{owner}/{METRICS_NAME}"
    check_name(name, "the Space of the metrics")
    return commit_files(name, metrics_files(name), "Upload metrics", repo_type="space", private=private, token=token)


def metrics_files(name: str) -> Files:
    """The files of the Space with the metrics."""
    return {
        f"{METRICS_NAME}.py": Path(MODULE) / f"{METRICS_NAME}.py",
        "app.py": METRICS_APP.encode(),
        "requirements.txt": f"peft-cl=={__version__}\n".encode(),
        "README.md": _page_of_space("Continual Learning", METRICS_TEXT.format(name=name), tags=["evaluate", "metric"]),
    }


def push_demo(adapter_id: str, space_id: str, *, private: bool = False, token: str | None = None) -> CommitInfo:
    """Push a Space with the page of an adapter that is on the Hub: drop an image, see the classes.

    The page is the one of `peft-cl serve`, read-only, as all visitors share it.

    Args:
        adapter_id: The adapter, `"user/name"`. A Space can read a private one only if it has a secret `HF_TOKEN`.
        space_id: The Space, `"user/name"`; made if there is none.
        private: Make the Space private.
        token: A token with the right to write. `None`: that of `hf auth login`, or `HF_TOKEN`.

    Raises:
        ValueError: a name is none on the Hub.
        HubError: The Hub, or the way to it, refused something.

    Example:
        ```python
        >>> push_demo("user/coda-birds", "user/birds")
        ```
    """
    check_name(adapter_id, "adapter_id")
    check_name(space_id, "space_id")
    files = demo_files(adapter_id)
    return commit_files(space_id, files, f"Page of {adapter_id}", repo_type="space", private=private, token=token)


def demo_files(adapter_id: str) -> Files:
    """The files of the Space with the page of an adapter."""
    name = adapter_id.split("/")[-1]
    text = f"# {name}\n\nThe page of the adapter [{adapter_id}](https://huggingface.co/{adapter_id})."
    app = f"""\
from peft_cl.serving import make_page


page = make_page({literal(adapter_id)}, read_only=True)

if __name__ == "__main__":
    page.launch()
"""
    return {
        "app.py": app.encode(),
        "requirements.txt": f"peft-cl[serve]=={__version__}\n".encode(),
        "README.md": _page_of_space(name, text, models=[adapter_id]),
    }


def _page_of_space(title: str, text: str, **more: Any) -> bytes:
    """The `README.md` of a Space, whose first lines say how it is run."""
    facts: dict[str, Any] = {"title": title, "sdk": "gradio"}
    try:
        facts["sdk_version"] = version("gradio")
    except PackageNotFoundError:  # the Hub takes its newest then
        pass
    facts |= {"app_file": "app.py", "pinned": False, **more}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n{text.rstrip()}\n".encode()
