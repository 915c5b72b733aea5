"""`peft-cl card`: the card anew from the record, with what was given to the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_card import run

from peft_cl.cli import main
from peft_cl.hub import model_card, write_model_card
from peft_cl.hub.present_card import kept_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run().save(tmp_path)
    options = {"adapter_id": "user/coda", "license": "mit", "limits": ["Only cats.", "And *dogs*."]}
    write_model_card(tmp_path, run(), **options)
    return tmp_path


def test_the_command_writes_the_card_anew_and_keeps_what_was_given(folder: Path, capsys) -> None:
    changed = run(seed=11)
    changed.save(folder)
    assert main(["card", str(folder)]) == 0
    assert capsys.readouterr().out == f"The card is in {folder / 'README.md'}.\n"
    text = (folder / "README.md").read_text()
    options = {"adapter_id": "user/coda", "license": "mit", "limits": ["Only cats.", "And *dogs*."]}
    assert text == model_card(changed, has_picture=True, **options)
    assert (folder / "accuracy_matrix.png").read_bytes().startswith(b"\x89PNG")


def test_options_of_the_command_take_the_place_of_what_was_given(folder: Path) -> None:
    words = [
        "--adapter-id",
        "me/new",
        "--license",
        "apache-2.0",
        "--limit",
        "For research.",
        "--limit",
        "Not for sale.",
    ]
    assert main(["card", str(folder), *words, "--model", "me/vit", "--dataset", "me/birds"]) == 0
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("apache-2.0", "me/vit", ["me/birds"])
    assert "- For research.\n- Not for sale.\n" in card.text and "Only cats" not in card.text
    assert 'PeftModel.from_pretrained(base, "me/new")' in card.text


def test_a_card_by_hand_or_none_at_all_gives_nothing(folder: Path) -> None:
    (folder / "README.md").write_text("---\na: [\n---\n")
    assert main(["card", str(folder)]) == 0
    (folder / "README.md").unlink()
    assert main(["card", str(folder)]) == 0
    assert kept_of((folder / "README.md").read_text()) == kept_of("")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--license", "My own"], "license is 'My own' in the metadata of README.md, but must be an identifier"),
        (["--limit", "a\nb"], "--limit must be one line"),
        (["--limit", " "], "--limit must be one line"),
    ],
)
def test_the_command_refuses_what_makes_no_card_and_leaves_the_old_one(
    words: list[str], reason: str, folder: Path, capsys
) -> None:
    before = (folder / "README.md").read_bytes()
    assert main(["card", str(folder), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("peft-cl: ") and reason in line
    assert (folder / "README.md").read_bytes() == before


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_the_command_needs_a_record(content: str | None, tmp_path: Path, capsys) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(["card", str(tmp_path)]) == 2
    assert main(["card", str(tmp_path / "nowhere")]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "results.json" in first and "There is no folder" in second
    assert not (tmp_path / "README.md").exists()
