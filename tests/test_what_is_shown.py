"""Whatever names hold, a terminal obeys none of it, a card shows no more than its letters, and messages are short."""

from __future__ import annotations

import ast
import copy
import datetime
import logging
import math
import os
import re
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel
from test_card import run

import peft_cl
from peft_cl import CodaPromptConfig, ContinualTrainingArguments, RandomResizedCropFlip, class_incremental
from peft_cl.cli import WORDS, main
from peft_cl.commands.errors import CommandError, explained
from peft_cl.commands.output import plain_warnings, say, say_json
from peft_cl.commands.sections import DatasetSettings, ModelSettings, ScenarioSettings
from peft_cl.commands.settings import SECTIONS, make_settings
from peft_cl.hub import model_card
from peft_cl.metrics import results_table
from peft_cl.text import brief, code, counted, in_markdown, literal, plain


EVIL = [
    "\x1b]0;title\x07\x1b[2J\x1b[31mred",
    "a\x9b31m\x7f",
    "abc\u202egnp\u202c\u2066x\u2069",
    "zero\u200bwidth\ufeff\u2060",
    "half \ud800 pair",
    "two\nlines\r\n\x0b\x0c\x85\u2028\u2029and\ta tab",
    "<img src=x onerror=alert(1)>",
    "</details><script>x</script>",
    "![a](https://evil.example/x.png)",
    "[a](javascript:x) and https://evil.example www.evil.example me@evil.example",
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "```\nfence",
    "`a``b",
    "a | b |\n|---|",
    "**bold** _it_ ~~no~~ &lt;b&gt; \\",
    '"); import os; os.system("x")  # \'"""',
    "[^1]: note",
    "$$x$$",
    "x" * 1_000_000,
]
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def hidden(text: str) -> list[str]:
    return [letter for letter in text if unicodedata.category(letter) in HIDDEN and letter != "\n"]


@pytest.mark.parametrize("name", EVIL, ids=range(len(EVIL)))
def test_a_name_is_one_short_line_without_hidden_letters(name) -> None:
    for shown in (plain(name), in_markdown(name), code(name), brief(name), brief([name] * 1000)):
        assert not hidden(shown) and "\n" not in shown and len(shown) < 500
    scope: dict = {}
    exec(f"text = {literal(name)}", scope)
    assert scope["text"] == name and "\n" not in literal(name)


@pytest.mark.parametrize(
    "name", ["cat", "art_painting", "日本語", "Ω (big)", "naïve", "L2P (rate 0.1)", "кот", "1,000 m"]
)
def test_an_ordinary_name_stays_as_it_is(name) -> None:
    assert plain(name) == in_markdown(name) == name


def test_what_is_counted_is_in_the_plural_where_it_is_not_one() -> None:
    assert [counted(count, "class") for count in (0, 1, 1000)] == ["0 classes", "1 class", "1,000 classes"]
    assert [counted(count, "epoch") for count in (1.0, 0.5, 5)] == ["1 epoch", "0.5 epochs", "5 epochs"]


def markup(markdown: str) -> str:
    """What is left of Markdown without code, in which nothing has a meaning."""
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", markdown)


@pytest.mark.parametrize("name", EVIL, ids=range(len(EVIL)))
def test_no_name_gives_a_card_structure(name) -> None:
    scenario = {**run().scenario, "name": name, "class_order": [name, "b"]}
    results = run(
        method=name,
        dataset=name,
        base_model=name,
        task_names=[name, "b", name],
        scenario=scenario,
        command=f"peft-cl {name}",
        hyperparameters={"optim": name, "adapter": {"head": name, "head_features": name}, "device": name},
        versions={name: name},
    )
    card = model_card(results, {"layers": name, name: 1}, adapter_id=name)
    assert not hidden(card) and len(card) < 20_000
    card.encode()
    header, text = card.split("---\n", 2)[1:]
    assert yaml.safe_load(header)["library_name"] == "peft"
    usual = model_card(run(), {"layers": [0], "top_k": 1}, adapter_id="me/x")
    python = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    compile(python, "card", "exec")
    assert "import os; os" not in re.sub(r'"(\\.|[^"\\])*"', "", python)
    blocks = re.compile(r"```(python|bibtex)\n.*?\n```", re.DOTALL)
    rest, plain_rest = (markup(blocks.sub("", each.split("---\n", 2)[2])) for each in (text and card, usual))
    for mark in ("<", "![", "**", "~~", "&lt", "$$"):
        assert rest.count(mark) <= plain_rest.count(mark), mark
    links = re.findall(r"\]\((?!https://(huggingface\.co|arxiv\.org))", rest)
    assert not links and "evil" not in rest
    headings = [line for line in rest.splitlines() if line.startswith("#")]
    assert len(headings) <= len([line for line in plain_rest.splitlines() if line.startswith("#")])
    assert "import os" not in markup(results_table([results])) or "system(" in in_markdown(name)
    (row,) = results_table([results]).splitlines()[2:]
    assert len(re.findall(r"(?<!\\)\|", row)) == 7


def test_evaluate_info_plot_and_train_print_no_codes(train, place, tmp_path, capfd) -> None:
    names = [f"{name}\x1b[31m\u202e" for name in ("red", "green", "blue", "yellow")]
    from datasets import load_dataset

    data = load_dataset(str(place / "data"))
    for split, part in data.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        part.cast_column("label", ClassLabel(names=names)).to_parquet(tmp_path / "data" / f"{split}.parquet")
    words = ("--dataset.path", str(tmp_path / "data"), "--training.max_steps", "1", "--training.disable_tqdm", "false")
    assert train(*words) == 0
    out = str(tmp_path / "out")
    for command in (["evaluate", out, "--dataset", str(tmp_path / "data")], ["info", out], ["plot", out]):
        for options in ([], ["--json"]):
            if command[0] != "plot" or not options:
                assert main([*command, *options]) == 0
    printed = capfd.readouterr()
    assert "\\x1b[31m\\u202e" in printed.out
    for text in (printed.out, printed.err):
        assert "\u202e" not in text and "\x1b[31m" not in text
    assert main(["evaluate", out, "--dataset", "./no\x1b[31m\u202ewhere"]) == 2
    assert not hidden(capfd.readouterr().err)


def test_a_trainer_in_python_shows_names_plainly(make_trainer, data, capfd) -> None:
    names = [f"{index}\x1b[31m" for index in range(6)]
    evil = {split: part.cast_column("label", ClassLabel(names=names)) for split, part in data.items()}
    scenario = class_incremental(evil, num_tasks=2)
    for index, task in enumerate(scenario):
        object.__setattr__(task, "name", f"task\x1b[31m{index}")
    trainer = make_trainer(CodaPromptConfig(components_per_task=1), scenario=scenario, max_steps=1)
    trainer.args.disable_tqdm = False
    trainer.train()
    printed = capfd.readouterr()
    assert "\x1b[31m" not in printed.out + printed.err


def test_warnings_and_logs_are_plain_too(capfd) -> None:
    with plain_warnings():
        shown = warnings.formatwarning("class \x1b[31m is missing\nnow", UserWarning, "file.py", 3)
        for name in ("peft_cl.trainer", "transformers"):
            logging.getLogger(name).warning("task \x1b[31m%s", "\u202ex")
    assert shown == "UserWarning: class \\x1b[31m is missing now\n"
    assert not hidden(capfd.readouterr().err)
    assert warnings.formatwarning("a\nb", UserWarning, "file.py", 3) != "UserWarning: a b\n"


def test_what_the_terminal_has_no_code_for_is_escaped(tmp_path, monkeypatch) -> None:
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        say("日本 – \ud800", stream)
    assert (tmp_path / "out").read_text() == "\\u65e5\\u672c \\u2013 \\ud800\n"


def test_json_stays_json(capsys) -> None:
    import json

    value = {"\x7f\x1b\u202e": "\ud800"}
    say_json(value)
    printed = capsys.readouterr().out
    assert not hidden(printed) and json.loads(printed) == value


# ----------------------------------------------------------------------------------------------- messages

LOOP: dict = {}
LOOP["a"] = LOOP
VALUES = [
    [],
    ["l2p"],
    [["a"]],
    {"a": 1},
    {"x": {"y": [1]}},
    {1: 2},
    -1,
    10**30,
    1.5,
    math.nan,
    math.inf,
    True,
    "",
    "x\x1b[2J",
    datetime.date(2020, 1, 1),
    b"x",
    {"a"},
    "x" * 10**6,
    LOOP,
]
CONFIG = {
    "model": {"name": "vit-tiny-64"},
    "method": "coda",
    "dataset": {"path": "x/y"},
    "scenario": {"num_tasks": 2},
    "training": {"use_cpu": True, "disable_tqdm": True},
}
OWN = [
    field.name
    for field in fields(ContinualTrainingArguments)
    if field.name in ContinualTrainingArguments.__dict__.get("__annotations__", {}) and field.init
]
COMMON = ["learning_rate", "num_train_epochs", "max_steps", "seed", "optim", "lr_scheduler_type", "bf16", "report_to"]
PLACES = [
    *((name,) for name in SECTIONS if name != "continue_from"),
    *(
        (section, field.name)
        for section, cls in (
            ("model", ModelSettings),
            ("dataset", DatasetSettings),
            ("scenario", ScenarioSettings),
            ("augmentation", RandomResizedCropFlip),
            ("adapter", CodaPromptConfig),
        )
        for field in fields(cls)
    ),
    *(("training", name) for name in dict.fromkeys([*OWN, *COMMON])),
    *(("strategy", name) for name in ("er", "ewc", "joint")),
    ("strategy", "er", "memory_size"),
    ("adapter", "method"),
    ("adapter", "presets"),
]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_value_of_the_wrong_type_is_refused_in_one_line(place, tmp_path) -> None:
    for value in VALUES:
        config = {**copy.deepcopy(CONFIG), "output_dir": str(tmp_path / "out")}
        section = config
        for step in place[:-1]:
            section[step] = section = section[step] if isinstance(section.get(step), dict) else {}
        section[place[-1]] = value
        try:
            make_settings(config)
        except CommandError as error:
            assert not hidden(str(error)) and "\n" not in str(error) and 10 < len(str(error)) < 5000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "[l2p]"], "method is ['l2p'], but must be text"),
        (["--method", "{a: 1}"], "method is {'a': 1}"),
        (["--preset", "[best]"], "preset is ['best']"),
        (["--adapter.method", "L2P"], "There is no setting adapter.method."),
        (
            ["--adapter.components_per_task", "many"],
            "components_per_task is 'many', but must be a whole number",
        ),
        (["--adapter.layers", "{a: 1}"], "adapter.layers is {'a': 1}, but must be"),
        (["--strategy", "[1]"], "strategy is [1], but must be a mapping"),
    ],
)
def test_the_message_names_setting_value_and_rule(refused, words, expected) -> None:
    assert expected in refused(*words)


def test_long_messages_keep_their_beginning_and_their_end(capsys) -> None:
    with pytest.raises(CommandError) as caught, explained("The data cannot be read"):
        raise AttributeError("x" * 10_000_000 + " Give another one.")
    text = str(caught.value)
    assert text.startswith("The data cannot be read: xxx") and text.endswith("Give another one.") and len(text) < 5000


# ----------------------------------------------------------------------------------------------- the process


def started(*words: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "peft_cl.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_version_and_help_import_no_torch(word) -> None:
    code = f"import sys; sys.argv = ['peft-cl', '{word}']; from peft_cl.cli import main\ntry: main()\nfinally:"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code} print(sorted({{'torch', 'peft', 'transformers'}} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
    assert ended.returncode == 0 and ended.stdout.endswith("[]\n"), ended.stderr
    assert ("peft-cl 0" in ended.stdout) if word == "--version" else all(name in ended.stdout for name in WORDS)


def test_importing_the_package_imports_no_more_than_a_loader_needs() -> None:
    """`import peft_cl` makes the methods known to PEFT; what reads data waits until it is asked for."""
    code = "import sys, peft_cl\nfrom peft import PeftType\n"
    code += "print('datasets' in sys.modules, 'L2P' in PeftType.__members__)"
    code += "\nprint(peft_cl.class_incremental.__name__, peft_cl.metrics.RunResults is peft_cl.RunResults)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert ended.stdout == "False True\nclass_incremental True\n", ended.stderr


def test_the_names_that_type_checkers_see_are_those_there_are() -> None:
    tree = ast.parse(Path(peft_cl.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {name.name: line.module for line in block.body for name in line.names}
    assert seen == {name: module for name, module in peft_cl.MODULE_OF.items() if name != "__version__"}
    assert all(getattr(peft_cl, name) is not None for name in peft_cl.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        peft_cl.no_such_name  # noqa: B018


def test_a_command_without_a_word_is_a_fault() -> None:
    ended = started()
    assert ended.returncode == 2 and "usage: peft-cl" in ended.stderr


def test_a_reader_that_goes_away_is_no_traceback(monkeypatch, capfd, trained) -> None:
    """The same as `peft-cl info RUN | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "peft_cl.cli", "info", str(trained)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    os.close(writing)
    assert process.returncode == 141 and "Error" not in process.stderr and "Exception" not in process.stderr
