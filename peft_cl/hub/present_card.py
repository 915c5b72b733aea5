"""A card that is there: whether the Hub will take it, and what of it a new one keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..text import brief, literal
from .usage import UNNAMED


#: The Hub's limit for the metadata of a card is lower than any text of ours is long.
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.\-+]*")
#: The card that PEFT writes has places to be filled in.
OF_PEFT = "[More Information Needed]"
#: How the limits begin that every card has.
USUAL_LIMITS = ("It knows ", "The results are of ")


@dataclass(frozen=True)
class Kept:
    """What a card says that no record does.

    Attributes:
        adapter_id: The adapter's name in the usage example.
        license: Its licence.
        limits: Its limits beside those that every card has.
    """

    adapter_id: str | None = None
    license: str | None = None
    limits: tuple[str, ...] = ()


def check_card(text: str) -> None:
    """Refuse metadata that the Hub would refuse, before anything is sent; no network is needed.

    Raises:
        ValueError: it names the field, its value and the rule.
    """
    try:
        data = ModelCard(text).data.to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The metadata of README.md cannot be read ({' '.join(str(error).split())}). Correct the lines between "
            "the first two lines ---, or write the card anew with peft-cl card."
        ) from error
    for field in ("base_model", "datasets"):
        values = data.get(field) or []
        for name in [values] if isinstance(values, str) else values:
            _check_name(field, name)
    for field, rule in (("license", "such as apache-2.0"), ("pipeline_tag", "such as image-classification")):
        value = data.get(field)
        if value is not None and not (isinstance(value, str) and IDENTIFIER.fullmatch(value)):
            raise ValueError(
                f"{field} is {brief(value)} in the metadata of README.md, but must be an identifier of the Hub, "
                f"{rule}. Correct it there."
            )
    tags = data.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) and tag for tag in tags)):
        raise ValueError(f"tags is {brief(tags)} in the metadata of README.md, but must be a list of words.")


def _check_name(field: str, name: object) -> None:
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError) as error:
        raise ValueError(
            f"{field} is {brief(name)} in the metadata of README.md, but must be a name on the Hub, such as "
            "google/vit-base-patch16-224. Correct it there, or write the card anew with peft-cl card."
        ) from error


def is_of_peft(text: str) -> bool:
    """Whether a card is the one that `save_pretrained` of PEFT writes, which nobody has filled in."""
    return text.count(OF_PEFT) > 5


def kept_of(text: str) -> Kept:
    """What a new card takes over from one of ours; of one that cannot be read, nothing."""
    try:
        license = ModelCard(text).data.license
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return Kept()
    named = re.search(r'PeftModel\.from_pretrained\(base, "([^"\n]+)"\)', text)
    section = re.search(r"^## Limits\n\n((?:- .*\n)+)", text, re.MULTILINE)
    points = [line[2:] for line in section[1].splitlines()] if section else []
    return Kept(
        adapter_id=named[1] if named and named[1] != UNNAMED else None,
        license=license if isinstance(license, str) else None,
        limits=tuple(point for point in points if not point.startswith(USUAL_LIMITS)),
    )


def with_name(text: str, adapter_id: str) -> str:
    """The card, whose usage example loads the adapter by its name on the Hub, if it had none so far."""
    return text.replace(literal(UNNAMED), literal(adapter_id))
