"""What messages advise is read from them and done: it must be there, and it must work."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from refused_cases import BAD_ARGUMENTS, BAD_SETTINGS

import peft_cl
from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    LinearProbeConfig,
    Scenario,
    strategies,
)
from peft_cl.cli import WORDS, make_parser
from peft_cl.commands import sections
from peft_cl.heads import HEADS, Head
from peft_cl.heads.solved import SolvedHead
from peft_cl.trainer.strategy import STRATEGIES
from peft_cl.tuners.base.model import PromptPoolModel
from peft_cl.tuners.base.pool import PromptPool


# ------------------------------------------------------------------------------------------- what messages say


def words_of(node: ast.AST) -> str:
    """The text of an expression; `{}` or `{name}` for what is put in when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(words_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return "{%s}" % (node.value.id if isinstance(node.value, ast.Name) else "")
    if isinstance(node, ast.BinOp):
        return words_of(node.left) + words_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{words_of(node.body)} {words_of(node.orelse)}"
    return "{}"


#: What a message is given to; a RuntimeError is a fault of ours, and nobody can mend it outside.
SAID = r"(warnings\.warn|logger\.warning)|(?!Runtime)\w*Error"


def messages() -> Iterator[tuple[str, str, str]]:
    """(file:line, text, "error" or "warning") of every message that the package raises, warns of or logs."""
    root = Path(peft_cl.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            said = isinstance(node, ast.Call) and re.fullmatch(SAID, ast.unparse(node.func))
            if said and node.args:
                kind = "warning" if said[1] else "error"
                yield f"{path.relative_to(root)}:{node.lineno}", words_of(node.args[0]), kind


MESSAGES = list(messages())


def unknown(pattern: str, known: Callable[..., bool]) -> set[tuple[Any, str]]:
    """What messages name in the form of `pattern`, and where, without what is `known`."""
    return {(name, where) for where, text, _ in MESSAGES for name in re.findall(pattern, text) if not known(name)}


def known_settings() -> set[str]:
    """Everything that takes a value by name: fields, and parameters of what users call."""
    holders = (CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig, ContinualTrainingArguments)
    holders += (sections.DatasetSettings, sections.ModelSettings, sections.ScenarioSettings)
    names = {field.name for holder in holders for field in fields(holder)}
    called = [getattr(peft_cl, name) for name in peft_cl.__all__]
    called += [value for head in HEADS.values() for value in (head, head.__init__)]
    called += [
        ContinualTrainer.__init__,
        ContinualTrainer.train,
        ContinualTrainer.evaluate,
        ContinualTrainer.train_task,
    ]
    called += [PromptPoolModel.begin_task, PromptPoolModel.forward, Scenario.__init__, Scenario.with_task, Head.grow]
    called += [each.__init__ for each in STRATEGIES.values()]
    called += [datasets.load_dataset, peft.PeftModel.from_pretrained, torch.nn.functional.cross_entropy]
    called += [transformers.PreTrainedModel.from_pretrained]
    for each in called:
        if callable(each):
            names |= set(inspect.signature(each).parameters)
    return names | {"dtype", "interpolate_pos_encoding"}  # keyword arguments of from_pretrained and of models


def test_settings_that_messages_name_exist():
    known = known_settings()
    assert not unknown(r"\b([a-z]\w+)=(?![=\s])", known.__contains__)


def test_options_that_messages_name_exist():
    known = {"multi_gpu"}  # of accelerate launch
    for word in WORDS:
        parser = make_parser(word)._subparsers._group_actions[0].choices[word]
        known |= {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    assert not unknown(r"(?<![\w-])--([a-z][\w-]*)(?![\w.-])", known.__contains__)


def test_settings_of_sections_that_messages_name_exist():
    holders = {
        "model": sections.ModelSettings,
        "dataset": sections.DatasetSettings,
        "scenario": sections.ScenarioSettings,
        "training": ContinualTrainingArguments,
    }
    models = (PromptPoolModel, peft.PeftModel, transformers.ViTForImageClassification)

    def is_known(found: tuple[str, str]) -> bool:
        section, name = found
        if name in {field.name for field in fields(holders[section])}:
            return True
        if section == "model":  # in Python, a model
            return name in ("config", "base_model") or any(hasattr(model, name) for model in (*models, peft_cl))
        return section == "scenario" and name == "label_names"

    assert not unknown(r"\b(model|dataset|scenario|training)\.([a-z_]\w*)", is_known)


def test_calls_that_messages_name_exist():
    places = [
        peft_cl,
        peft_cl.scenarios,
        peft_cl.trainer,
        strategies,
        peft,
        datasets,
        datasets.Dataset,
        transformers,
        torch.nn.functional,
    ]
    places += [
        PromptPoolModel,
        PromptPool,
        peft.PeftModel,
        ContinualTrainer,
        *(base for each in STRATEGIES.values() for base in each.__mro__),
        Scenario,
        Head,
        SolvedHead,
        *HEADS.values(),
    ]
    places += [{"str": str}, __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)]
    has = lambda place, name: name in place if isinstance(place, dict) else hasattr(place, name)  # noqa: E731
    assert not unknown(r"\b([A-Za-z_]\w+)\((?!s\))", lambda name: any(has(place, name) for place in places))


#: Words that begin a remedy.
VERBS = (
    "activate add begin bring call cast choose compute convert copy correct count crop define divide draw "
    "enlarge evaluate fill free give import install join keep leave let list load lower make mend move name "
    "number observe pass pip predict put read remove rename replace restore save say set shorten start take "
    "train trust try turn update upgrade use wrap write"
).split()
REMEDY = re.compile(
    rf"\{{(_?remedy|form|rule)\}}|\b(must (be|hold|have|lie|define|say)|{'|'.join(VERBS)})\b", re.IGNORECASE
)


def test_every_error_says_what_to_do():
    """But for those that pass on what another says, or say what is in a file: its place and remedy are said around."""
    passed_on = ("metrics/record_checks.py", "trainer/snapshot.py", "trainer/resuming.py", "commands/options.py")
    without = {
        (where, text)
        for where, text, kind in MESSAGES
        if kind == "error"
        and len(re.sub(r"\{\w*\}|\W", "", text)) > 20
        and not REMEDY.search(text)
        and not where.startswith(passed_on)
    }
    assert not without


# --------------------------------------------------------------------------------------------- what is followed


VALUE = r"(None|True|False|'[^']*'|\[[^\]]*\]|-?[\d.]*\d)"
#: Remedies, and what becomes of the settings they name: `it` is what the message is about, `...` takes a setting out.
ADVICE = [
    (rf"[Ss]et (\w+)(?: to|=) ?{VALUE}", lambda found: {found[1]: ast.literal_eval(found[2])}),
    (rf"[Ll]eave (\w+) at {VALUE}", lambda found: {found[1]: ast.literal_eval(found[2])}),
    (rf"[Ss]et both to {VALUE}", lambda found: dict.fromkeys(("layers", "g_layers"), ast.literal_eval(found[1]))),
    (rf"[Ss]et the coefficient to {VALUE}", lambda found: {"it": ast.literal_eval(found[1])}),
    (rf"[Ss]et (\w+), for instance to {VALUE}", lambda found: {found[1]: ast.literal_eval(found[2])}),
    (r"[Ll]eave (it|the others) out|to another\b|one of the two to its default", lambda found: {"it": ...}),
    (r"Lower (\w+)", lambda found: {found[1]: 1}),
]
#: Rules, of which the first value that is named is taken.
RULES = [
    (rf"(?:for instance|such as) {VALUE}", lambda found: ast.literal_eval(found[1])),
    (rf"must be (?:one of )?(?:a folder, or )?{VALUE}", lambda found: ast.literal_eval(found[1])),
    (r"must be one of (\w+)", lambda found: found[1]),
    (r"at least (\d+)", lambda found: int(found[1])),
    (r"a number above 0", lambda found: 1),
    (r"a list of whole numbers, counted from 0", lambda found: [0]),
    (r"must be a dict", lambda found: {}),
]


def advised(message: str) -> dict[str, Any]:
    """What the message says to change in the settings."""
    subject = re.match(r"\w+", message)[0]
    changes: dict[str, Any] = {}
    for pattern, change in ADVICE:
        for found in re.finditer(pattern, message):
            changes |= change(found)
    changes = {subject if name in ("it", "both") else name: value for name, value in changes.items()}
    for pattern, value in RULES if not changes else ():
        if found := re.search(pattern, message):
            return {subject: value(found)}
    assert changes, f"no remedy in: {message}"
    return changes


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    for name, value in changes.items():
        options = settings.get("head_options")
        place = settings
        if isinstance(options, dict) and name in options:
            place = settings["head_options"] = dict(options)
        place.pop(name, None)
        if value is not ...:
            place[name] = value
    return settings


#: What cannot be done in a test: the message says to install another version.
ELSEWHERE = ("Upgrade with",)


@pytest.mark.parametrize(("config_class", "settings", "message"), BAD_SETTINGS)
def test_a_configuration_is_mended_as_its_messages_say(config_class, settings, message):
    for _ in range(4):  # one fault may stand behind another
        try:
            made = config_class(**settings)
        except ValueError as error:
            if any(words in str(error) for words in ELSEWHERE):
                return
            settings = changed(settings, advised(str(error)))
        else:
            assert isinstance(made, config_class)
            return
    pytest.fail(f"still refused with {settings}")


@pytest.mark.parametrize(("name", "value", "rule"), BAD_ARGUMENTS)
def test_an_argument_is_mended_as_its_message_says(name, value, rule, tmp_path):
    settings = {name: value}
    with pytest.raises(ValueError) as refused:
        ContinualTrainingArguments(str(tmp_path), use_cpu=True, **settings)
    settings = changed(settings, advised(str(refused.value)))
    assert ContinualTrainingArguments(str(tmp_path), use_cpu=True, **settings)
