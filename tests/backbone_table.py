"""The tables of `docs/backbones.md`, from the code's own facts: `python tests/backbone_table.py` writes them there."""

from __future__ import annotations

import re
from pathlib import Path

from backbone_cases import FAMILIES, tiny_backbone
from peft import get_peft_model
from tuner_cases import CASES, config

from peft_cl.backbones import FAMILIES as KNOWN


PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
#: Columns of the matrix: title -> the case of `tuner_cases` that is tried.
FORMS = {
    "L2P, tokens": "l2p",
    "L2P, prefix": "l2p-deep",
    "DualPrompt": "dualprompt",
    "CODA-Prompt": "coda",
    "CODA-Prompt, tokens of each layer": "coda-textbook",
    "Frozen features": "linear-probe",
}
READS = {"cls": "CLS token", "mean": "mean of the patches", "cls+mean": "CLS token and mean of the patches"}


def facts() -> str:
    """One row for each family: what is read of it."""
    lines = ["| Family (`model_type`) | Classification model | Query | Its own classifier reads | Other image sizes |"]
    lines.append("|---|---|---|---|---|")
    for name in FAMILIES:
        family, model = KNOWN[name], tiny_backbone(name)
        encoder = getattr(model, family.encoder)
        query = "CLS token" if family.cls_is_first_token else "what its attention head pools"
        if not family.has_cls(encoder):
            query = "mean of the patches"
        sizes = "with `interpolate_pos_encoding=True`" if family.interpolates else "as they are"
        models = ", ".join(f"`{each}`" for each in family.model_classes)
        lines.append(f"| `{name}` | {models} | {query} | {READS[family.reads]} | {sizes} |")
    return "\n".join(lines)


def matrix() -> str:
    """For each family and form of prompts: whether it works, found by making it."""
    reasons: dict[str, int] = {}
    lines = ["| Family | " + " | ".join(FORMS) + " |", "|---|" + ":---:|" * len(FORMS)]
    for name in FAMILIES:
        cells = []
        for case in FORMS.values():
            try:
                get_peft_model(tiny_backbone(name), config(case))
                cells.append("yes")
            except ValueError as error:
                reason = re.split(r"(?<!\d)\. ", str(error))[0]
                cells.append(f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}." for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


def page(text: str) -> str:
    """The page with its tables as the code has them now."""
    for name, made in (("facts", facts()), ("matrix", matrix())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    assert set(FORMS.values()) <= set(CASES)
    PAGE.write_text(page(PAGE.read_text()))
