"""`peft-cl card`: write the card of a run anew, from its record and its adapter's configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..disk import check_file, local_path
from ..hub import write_model_card
from ..hub.present_card import Kept, kept_of
from ..hub.shared_card import CARD
from ..metrics.results import FILE_NAME
from ..plots import plot_accuracy_matrix
from ..plots.run import MATRIX_FILE
from ..trainer.extras import spared
from .errors import CommandError, explained
from .output import say
from .sources import load_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--adapter-id", metavar="USER/NAME", help="name of the adapter on the Hub, for the example")
    parser.add_argument("--license", metavar="ID", help="the adapter's licence, an identifier such as apache-2.0")
    parser.add_argument(
        "--limit", metavar="TEXT", action="append", help="a limit of the adapter, in Markdown; may be given repeatedly"
    )
    parser.add_argument("--model", metavar="NAME", help="the backbone's name on the Hub (default: the one on record)")
    parser.add_argument("--dataset", metavar="NAME", help="the data set's name on the Hub (default: as on record)")
    parser.epilog = (
        f"{CARD} is made from {FILE_NAME} and adapter_config.json, and {MATRIX_FILE}, which it shows, is drawn anew. "
        "What a card is given by hand stays where no option says otherwise: adapter id, licence and limits are taken "
        "from the present card. Other words in it are lost."
    )


def run(arguments: argparse.Namespace) -> None:
    folder = local_path(arguments.run)
    if not folder.is_dir():
        raise CommandError(f"There is no folder {arguments.run!r}. Give the folder of a run, with a {FILE_NAME}.")
    results = load_results(folder)
    if results is None:
        raise CommandError(
            f"There is no {FILE_NAME} in {arguments.run!r}, and a card has its numbers from there. Give the folder of "
            "a run; peft-cl push makes a card without numbers for an adapter that has no record."
        )
    with explained("The present card cannot be read"):
        kept = present(folder / CARD)
    limits = kept.limits if arguments.limit is None else arguments.limit
    if any("\n" in limit or not limit.strip() for limit in limits):
        raise CommandError("--limit must be one line of text. Give each limit by an option of its own.")
    with spared(f"No picture of the accuracy matrix in {folder}"):
        if results.finished_tasks:
            plot_accuracy_matrix(results, path=folder / MATRIX_FILE)
    with explained(f"The card of {arguments.run!r} cannot be written"):
        path = write_model_card(
            folder,
            results,
            base_model=arguments.model,
            dataset=arguments.dataset,
            adapter_id=arguments.adapter_id or kept.adapter_id,
            license=arguments.license or kept.license,
            limits=limits,
        )
    say(f"The card is in {path}.")


def present(path: Path) -> Kept:
    """What the card at `path` says that the record does not."""
    if not path.is_file():
        return Kept()
    check_file(path)
    return kept_of(path.read_text(encoding="utf-8", errors="replace"))
