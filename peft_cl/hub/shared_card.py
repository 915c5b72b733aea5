"""The card that an adapter is shared with: the one that is there, or a new one where that would say what is not so."""

from __future__ import annotations

import tempfile
from collections.abc import Set
from pathlib import Path

from ..disk import check_file
from ..heads.files import SUMS_FILE
from ..metrics import RunResults
from ..plots import plot_accuracy_matrix
from ..plots.run import MATRIX_FILE
from ..tuners.base.config import PromptPoolConfig
from .bare_card import bare_card
from .card import model_card
from .cleaned import cleaned_config
from .present_card import check_card, is_of_peft, kept_of, with_name
from .usage import PROCESSOR_FILES


CARD = "README.md"


def shared_card(
    path: Path,
    config: PromptPoolConfig,
    results: RunResults | None,
    repo_id: str,
    base_model: str | None,
    files: Set[str],
) -> dict[str, bytes]:
    """The card of an adapter that is shared as `repo_id`, and the picture that a new one shows.

    A card that is there may be somebody's work, so it stays, and its usage example gets the adapter's name. A new one
    is made in the place of PEFT's own, of one that speaks of sums that are not shared, and where the backbone gets
    another name.

    Args:
        path: The card in the adapter's folder, if it is there.
        config: The adapter's configuration.
        results: The record that is shared with it; `None`: there is none.
        repo_id: The adapter's name on the Hub.
        base_model: Its backbone's name on the Hub, if that was given.
        files: The other files that are shared.

    Raises:
        ValueError: The card's metadata is not valid.
    """
    text, picture = "", {}
    if path.is_file():
        check_file(path)
        text = path.read_text(encoding="utf-8")
    if not text or is_of_peft(text) or base_model or (SUMS_FILE not in files and SUMS_FILE in text):
        kept = kept_of(text)
        options = {
            "adapter_id": repo_id,
            "license": kept.license,
            "has_processor": any(name in files for name in PROCESSOR_FILES),
        }
        if results is None:
            text = bare_card(config, base_model=base_model, **options)
        else:
            picture = {} if MATRIX_FILE in files else _drawn(results)
            has_picture = bool(picture) or MATRIX_FILE in files
            facts = cleaned_config(config.to_dict(), base_model)
            text = model_card(results, facts, limits=kept.limits, has_picture=has_picture, **options)
    text = with_name(text, repo_id)
    check_card(text)
    return {CARD: text.encode(), **picture}


def _drawn(results: RunResults) -> dict[str, bytes]:
    """The picture of the accuracy matrix, where matplotlib is installed and there is something to draw."""
    if not results.finished_tasks:
        return {}
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside, MATRIX_FILE)
        try:
            plot_accuracy_matrix(results, path=path)
        except ImportError:
            return {}
        return {MATRIX_FILE: path.read_bytes()}
