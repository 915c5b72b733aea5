"""What the commands that make an adapter of others share: how these are loaded, and how the new one is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..hub.bare_card import bare_card
from ..serving.saving import check_output, save_adapter
from ..strategies.fine_tuning import BACKBONE_FOLDER
from ..text import counted, in_markdown, plain
from ..tuners.base.config import PromptPoolConfig
from .adapters import SavedAdapter
from .errors import CommandError, explained
from .evaluate import add_model_options, load_adapter
from .networks import network_of
from .output import say
from .sources import load_processor


#: The name in the model of the adapter that is made: PEFT saves this one into the folder itself.
MADE = "default"


def add_made_options(parser: argparse.ArgumentParser) -> None:
    """Options of a command that writes an adapter."""
    parser.add_argument(
        "--output", metavar="FOLDER", required=True, help="where the new adapter goes: a new or an empty folder"
    )
    add_model_options(parser, batch_size=False)


def free_folder(output: str) -> Path:
    """The folder for the new adapter.

    Raises:
        CommandError: There is something.
    """
    with explained(f"Nothing can be written to {output!r}"):
        return check_output(Path(output))


def read_source(name: str) -> SavedAdapter:
    """An adapter to make another of.

    Raises:
        CommandError: There is none, it has learnt nothing, or it holds a network for each task.
    """
    adapter = SavedAdapter.read(name)
    if not adapter.config.tasks:
        raise CommandError(f"The adapter {name!r} has learnt no task yet. Train it first.")
    if network_of(adapter.folder) is not None:
        raise CommandError(
            f"The adapter {name!r} holds a network for each task (PackNet, HAT), which can be neither joined nor "
            "divided. Give an adapter of another method."
        )
    return adapter


def load_source(adapter: SavedAdapter, arguments: argparse.Namespace, name: str, **options: Any) -> PeftModel:
    """The adapter as `name` on its base model, or on the one given in its place."""
    dtype, trust = arguments.dtype or adapter.dtype, arguments.trust_remote_code
    return load_adapter(adapter, arguments.model, dtype, trust, adapter_name=name, **options)


def processor_of(adapter: SavedAdapter, arguments: argparse.Namespace) -> Any:
    """The image processor that it was learnt with, or that of its base model."""
    name = adapter.processor or arguments.model or adapter.base_model
    return load_processor(name, trust_remote_code=arguments.trust_remote_code)


def has_own_backbone(adapter: SavedAdapter) -> bool:
    """Whether a fine-tuned backbone lies beside it."""
    return (adapter.folder / BACKBONE_FOLDER).is_dir()


def write_made(model: PeftModel, processor: Any, output: Path, words: str) -> None:
    """Write the adapter that was made, its sums, its image processor and a card.

    Args:
        words: What was made of what, a sentence for the card.
    """
    model.set_adapter(MADE)
    config = model.peft_config[MADE]
    with explained(f"The adapter cannot be written to {str(output)!r}"):
        save_adapter(model, processor, output, card=card_of(config, words))
    say(f"{plain(words, None)} {described(config)}: {output}")


def card_of(config: PromptPoolConfig, words: str) -> str:
    """The card of an adapter without a record, which says first what it was made of."""
    card = bare_card(config, has_processor=True)
    title = next(line for line in card.splitlines() if line.startswith("# "))
    return card.replace(f"{title}\n", f"{title}\n\n{in_markdown(words)}\n", 1)


def described(config: PromptPoolConfig) -> str:
    return f"It knows {counted(len(config.classes), 'class')} in {counted(config.num_tasks, 'task')}"


def short_name(adapter: SavedAdapter) -> str:
    """What an adapter is called in a card: its name on the Hub, or that of its folder, and no path of this machine."""
    is_folder = adapter.folder.resolve() == Path(adapter.name).expanduser().resolve()
    return adapter.folder.resolve().name if is_folder else adapter.name
