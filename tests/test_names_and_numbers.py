"""Names that look like numbers, truth values or dates; huge YAML; which classes are in which task."""

from __future__ import annotations

import time

import numpy as np
import pytest
import yaml
from datasets import Dataset, Image
from PIL import Image as PILImage

from peft_cl import class_incremental, domain_incremental
from peft_cl.cli import main
from peft_cl.commands.errors import CommandError
from peft_cl.commands.listing import list_tasks
from peft_cl.commands.options import parse_yaml, read_config, split_overrides, write_yaml


def splits(*names: str) -> tuple[Dataset, Dataset]:
    """Noisy images of these classes, three and two of each."""
    rng = np.random.default_rng(0)
    made = []
    for count in (3, 2):
        labels = [name for name in names for _ in range(count)]
        images = [PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in labels]
        made.append(Dataset.from_dict({"image": images, "label": labels}).cast_column("image", Image()))
    return tuple(made)


@pytest.mark.parametrize(
    "text",
    [
        "001",
        "08",
        "-01",
        "0o17",
        "0x1F",
        "0b101",
        "1_000",
        "12:30:45",
        "190:20:30",
        "2020-01-01",
        "2001-12-14t21:59:43.10",
    ]
    + ["yes", "no", "on", "off", "y", "N", "No", "2020-13-45", "1e", "NaN", "inf"],
)
def test_a_name_stays_as_it_is_written(text):
    assert parse_yaml(f"[{text}]", "it") == [text]
    assert split_overrides(["--a.b", text], ())[1] == [("a.b", text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("12", 12),
        ("-3", -3),
        ("+7", 7),
        ("1e-3", 0.001),
        ("1.5", 1.5),
        (".5", 0.5),
        ("true", True),
        ("~", None),
    ],
)
def test_numbers_stay_numbers(text, value):
    assert parse_yaml(text, "it") == value and type(parse_yaml(text, "it")) is type(value)


def test_names_that_are_numbers_with_zeros():
    order = parse_yaml("[003, 001]", "it")
    assert class_incremental(splits("001", "002", "003"), 2, class_order=order).classes == ("003", "001")


@pytest.mark.parametrize("maker", ["class", "domain"])
def test_an_id_that_is_the_name_of_another_is_refused(maker):
    data = splits("1", "2", "3")
    if maker == "class":
        make, argument = (lambda order: class_incremental(data, 1, class_order=order)), "class_order"
    else:
        both = tuple(each.add_column("domain", each["label"]).remove_columns("label") for each in data)
        both = tuple(each.add_column("label", ["a"] * len(each)) for each in both)
        make, argument = (lambda order: domain_incremental(both, domain_order=order)), "domain_order"
    with pytest.raises(
        ValueError,
        match=rf"{argument} has 1, which is the name of the {maker} '1', and the id of the {maker} '2'.*text",
    ):
        make([1, 2])
    # what the message says
    scenario = make(["1", "2"])
    assert (scenario.classes if maker == "class" else tuple(task.name for task in scenario)) == ("1", "2")


def test_ids_that_are_their_own_names_are_ids():
    train, test = (each.add_column("number", [int(name) for name in each["label"]]) for each in splits("0", "1", "2"))
    assert class_incremental((train, test), 1, "number", class_order=[2, 0]).classes == ("2", "0")
    assert class_incremental((train, test), 1, class_order=[2, 0]).classes == ("2", "0")


@pytest.mark.parametrize("entry", [True, 1.5, None])
def test_other_values_are_no_names(entry):
    with pytest.raises(ValueError, match="does not have: .*given as text, in quotes"):
        class_incremental(splits("a", "b"), 1, class_order=[entry])


@pytest.fixture
def config(place, tmp_path):
    """`config("scenario: ...")`: a configuration on folders named 001, 2020-01-01, no and true."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("001", "2020-01-01", "no", "true"):
            folder = tmp_path / "d" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                PILImage.fromarray(pixels).save(folder / f"{number}.png")

    def write(scenario: str) -> str:
        given = yaml.safe_load((place / "config.yaml").read_text())
        del given["scenario"]
        given |= {"dataset": {"path": str(tmp_path / "d")}, "output_dir": str(tmp_path / "out")}
        (tmp_path / "config.yaml").write_text(f"{yaml.safe_dump(given)}\nscenario: {scenario}\n")
        return str(tmp_path / "config.yaml")

    return write


def test_the_command_says_which_classes_are_in_which_task(config, capsys):
    path = config('{num_tasks: 2, class_order: [2020-01-01, "true", no, 001]}')
    assert main(["train", path, "--training.max_steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "  task_0:      2020-01-01, true\n  task_1:      no, 001\n" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--scenario.class_order", "[true, no]"], "class_order[0] is True, but must be text or a whole number"),
        (["--scenario.class_order", "[001, null]"], "class_order[1] is None, but must be text or a whole number"),
        (["--scenario.class_order", "[001, 1.50]"], "class_order[1] is 1.5, but must be text or a whole number"),
        (["--dataset.label_column", "1"], "label_column is 1, but must be text"),
        (["--dataset.train_split", "true"], "train_split is True, but must be text"),
        (["--dataset.name", "2020"], "name is 2020, but must be text"),
    ],
)
def test_what_is_no_text_asks_for_quotes(words, expected, config, capsys):
    assert main(["train", config("{num_tasks: 1}"), *words]) == 2
    message = capsys.readouterr().err
    assert expected in message and "needs quotes (on the command line '\"1\"')" in message


def test_quotes_on_the_command_line_help(config, capsys):
    words = ["--scenario.class_order", '["true", 001]', "--training.max_steps", "1"]
    assert main(["train", config("{num_tasks: 1}"), *words]) == 0
    assert "  task_0:      true, 001\n" in capsys.readouterr().out


def test_many_tasks_and_classes_are_bounded():
    names = [f"class {'x' * 100} {number}" for number in range(30)]
    text = list_tasks(class_incremental(splits(*names), 25))
    assert len(text.splitlines()) == 21 and max(map(len, text.splitlines())) < 130 and "(25 tasks in all)" in text
    assert "... (30 in all)" in list_tasks(class_incremental(splits(*names), 1))
    assert "\x1b" not in list_tasks(class_incremental(splits("\x1b[31mred", "b"), 1))


# ----------------------------------------------------------------------------------------------- YAML


def laughs(levels: int, merge: bool = False) -> str:
    lines = ["a0: &a0 " + ("{k: v}" if merge else "[x, x, x, x, x, x, x, x, x]")]
    for level in range(1, levels + 1):
        names = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{names}]}}" if merge else f"[{names}]"))
    return "\n".join([*lines, f"model: *a{levels}"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (laughs(9), "its aliases stand for more than 100,000 values"),
        (laughs(9, merge=True), "its aliases stand for more than 100,000 values"),
        ("model: &a [*a]", "an alias names what it is in"),
        ("a: &a {<<: *a}", "an alias names what it is in"),
        ("model: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("model: " + "1" * 5000, "not readable as YAML"),
        ("model: " + "x" * 1_100_000, "at most 1,000,000 are read"),
        ("? [a, b]\n: c", "not readable as YAML"),
        ("model: !!python/object/apply:os.system [echo]", "not readable as YAML"),
    ],
    ids=["aliases", "merge keys", "itself", "merges itself", "nested", "digits", "long", "list as key", "code"],
)
def test_what_would_be_huge_is_refused_before_it_is(text, expected, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(CommandError) as caught:
        read_config(tmp_path / "c.yaml")
    assert expected in str(caught.value) and len(str(caught.value)) < 1000
    assert time.perf_counter() - began < 5


def test_a_few_aliases_and_merges_are_taken(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert read_config(tmp_path / "c.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    "section", ["model", "dataset", "training", "strategy", "dataset.path", "scenario.class_order"]
)
def test_messages_are_short_whatever_is_given(section, config, capsys):
    value = f"[{', '.join(['[[1, 2], {a: b}]'] * 3000)}]"
    assert main(["train", config("{num_tasks: 1}"), f"--{section}", value]) == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) < 1500


@pytest.mark.parametrize("word", "1e3 001 no yes on null ~ true 1:30 2020-01-01 0x1 1_000 .5".split() + ["a: b", ""])
def test_what_is_written_is_read_again(word):
    """Run files of a suite and the best of a search are written by one command and read by another."""
    config = {"class_order": [word, 2, 0.5, None, True], "training": {"learning_rate": 1e-5}}
    text = write_yaml(config)
    assert parse_yaml(text, "it") == config
    assert yaml.safe_load(text) == config  # and by others
