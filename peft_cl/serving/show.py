"""What the page shows, as HTML: names of classes and tasks are text, whatever is in them."""

from __future__ import annotations

import html
from typing import Any

from ..text import counted, plain
from .choices import described
from .session import Answer, Session


#: In front of what went well.
DONE = '<p class="done" role="status">'


def text(value: Any, most: int | None = None) -> str:
    """Text in HTML: nothing in it has a meaning there, nor in the templates of gradio's page (`${...}`)."""
    return html.escape(plain(value, most)).replace("$", "&#36;").replace("{", "&#123;")


def title(words: str) -> str:
    return f"<h2>{text(words)}</h2>"


def heading(session: Session, read_only: bool) -> str:
    """The adapter's name, what it is, and that all who teach it teach the same one."""
    config = session.config
    base = (config.base_model_name_or_path or "").rstrip("/").split("/")[-1]
    what = f"{config.title} on {base}" if base else config.title
    shared = "All who have this page open teach the same adapter. It changes in memory alone, until it is saved."
    lines = [what] if read_only else [what, shared]
    return f"<h1>{text(session.name)}</h1>" + "".join(f"<p>{text(line)}</p>" for line in lines)


def classes(session: Session) -> str:
    """The classes that are known; those taught here come first and are marked."""
    with session.lock:
        names, taught = session.classes, session.taught
    others = [name for name in names if name not in taught]
    chips = [f'<li class="taught" title="taught here">{text(name, 60)}</li>' for name in taught]
    chips += [f"<li>{text(name, 60)}</li>" for name in others]
    count = counted(len(names), "class") + (f", {len(taught)} of them taught here" if taught else "")
    return f'<h3>{text(count)}</h3><ul class="names">{"".join(chips)}</ul>'


def bars(answer: Answer, count: int) -> dict[str, float]:
    """The most probable classes, for gradio's label."""
    prediction = answer.prediction
    pairs = list(zip(prediction.names, prediction.probabilities, strict=True))[:count]
    return {plain(name): probability for name, probability in pairs}


def details(answer: Answer, session: Session) -> str:
    """The task, and the prompts that the image got."""
    taught = answer.task is None and answer.prediction.task is not None
    facts = [("Task", "none, taught here" if taught else answer.task or "none, learnt from a stream")]
    if answer.expert is not None:
        facts.append(("Prompts of the task", answer.expert))
    facts += described(answer.choices, session.tuner.pool.rows_in_use) if answer.choices else []
    if not answer.choices:
        has_prompts = bool(session.config.prompted_layers)
        facts.append(("Prompts", "the same for all images" if has_prompts else "none in this method"))
    rows = "".join(f"<tr><th>{text(what)}</th><td>{text(value)}</td></tr>" for what, value in facts)
    return f"<table>{rows}</table>"


def done(message: str) -> str:
    return f"{DONE}{text(message)}</p>"


def is_done(shown: str) -> bool:
    return shown.startswith(DONE)


def fault(error: Any) -> str:
    return f'<p class="fault" role="alert">{text(error)}</p>'
