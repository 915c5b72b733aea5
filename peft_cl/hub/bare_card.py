"""The card of an adapter that no run has left a record of: what it is and how to use it, without a number."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from ..text import counted, in_markdown
from ..tuners.base.config import PromptPoolConfig
from .papers import PAPERS
from .parts import citation, classes_in_order, settings_of_method, tags
from .sources import find_source
from .usage import UNNAMED, usage


def bare_card(
    config: PromptPoolConfig,
    *,
    base_model: str | None = None,
    adapter_id: str | None = None,
    has_processor: bool = False,
    license: str | None = None,
) -> str:
    """Make the card of an adapter from its configuration alone.

    Args:
        config: The adapter's configuration.
        base_model: Hub id or path of the backbone; `None`: the one that the configuration names.
        adapter_id: Hub id of the adapter, for the usage example.
        has_processor: Whether the adapter's folder has its own image processor; else the backbone's is used.
        license: The adapter's licence, an identifier of the Hub.

    Returns:
        `str`: the card, YAML metadata and Markdown.
    """
    backbone = find_source(base_model or config.base_model_name_or_path or "")
    paper = PAPERS.get(config.peft_type.value)
    named = None if backbone.is_local else backbone.hub_id
    metadata = ModelCardData(
        license=license,
        library_name="peft",
        pipeline_tag="image-classification",
        base_model=named,
        base_model_relation="adapter" if named else None,
        tags=tags(config.method),
    )
    title = in_markdown(config.title)
    classes, tasks = config.classes if config.tasks else None, len(config.tasks or ())
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        f"An adapter for {backbone.link('backbone')}, trained by {title} with `peft_cl`."
        + (f" It knows {counted(len(classes), 'class')}, learnt in {counted(tasks, 'task')}." if classes else "")
        + " Nothing is on record about its data and its accuracy.",
        f"{paper.description} The method is from {paper.link}." if paper else "",
        usage(backbone, adapter_id or UNNAMED, has_processor),
        "## Protocol",
        *settings_of_method(config.to_dict()),
        *classes_in_order(classes),
        citation(paper),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
