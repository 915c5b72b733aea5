"""`peft-cl compare`: names, settings, folders and published rows that people may give, and what is kept of them."""

from __future__ import annotations

import fcntl
import math
import re

import pytest
from test_compare import METHODS, place, suite, told  # noqa: F401

from peft_cl.cli import main
from peft_cl.commands.errors import CommandError
from peft_cl.commands.importing import import_all
from peft_cl.commands.suites.page import page
from peft_cl.commands.suites.running import Progress, State, columns, ending, fitted, last_words
from peft_cl.commands.suites.suite import read_suite
from peft_cl.commands.suites.tables import Cell, Found, Table, make_table


FROZEN = {"method": "frozen"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {1: FROZEN}}, "methods has the name 1, but a name must be text with a letter or a digit"),
        ({"methods": {"..": FROZEN}}, "methods has the name '..', but"),
        ({"methods": None}, "The suite has no methods. Write such as"),
        ({"output_dir": ""}, "The suite has no output_dir. Write such as `output_dir: out/s`"),
        ({"seeded": [], "seeds": [0, 1]}, "the runs of the seeds [0, 1] would be the same"),
        ({"seeds": [-1]}, "seeds has -1, but a seed must be a whole number from 0 to 2**32 - 1"),
        ({"seeds": [2**32]}, "seeds has 4294967296, but a seed must be"),
        ({"settings": {1: [2]}}, "There is no section for settings 1."),
        ({"settings": {"training.seed": [1, 1]}}, "settings.training.seed has 1 more than once. Take one out."),
        ({"methods": {"A": {**FROZEN, "category": ["a"]}}}, "methods.A.category is ['a'], but must be text or null"),
        ({"tables": [{"columns": ["forgetting"], "methods": []}]}, "methods is empty. Name one or more"),
        ({"tables": [{"columns": ["forgetting"], "titles": {"forgeting": "F"}}]}, "Did you mean forgetting?"),
        (
            {"tables": [{"columns": ["forgetting"], "titles": {"forgetting": 3}}]},
            "titles.forgetting is 3, but must be",
        ),
        (
            {"published": [{"method": "A", "source": "b", "values": {"forgetting": math.nan}}]},
            "values.forgetting is nan, but must be a number",
        ),
    ],
)
def test_names_and_values_are_looked_at_before_the_first_run(suite, change, message, capsys):  # noqa: F811
    del suite["reference"]
    suite.update(change)
    assert suite.run() == 2
    assert message in told(capsys)
    assert not suite.folder.exists()


def test_a_configuration_of_one_run_is_no_suite(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: vit-tiny-64\nmethod: frozen\noutput_dir: out\n")
    assert main(["compare", str(path)]) == 2
    assert "has the sections of one run (model, method), and no methods. Give it to `peft-cl train`" in told(capsys)


def test_an_output_folder_below_a_file(suite, tmp_path, capsys):  # noqa: F811
    (tmp_path / "file").write_text("")
    suite["output_dir"] = str(tmp_path / "file" / "out")
    assert suite.run() == 2
    assert f"but '{tmp_path / 'file'}' is a file" in told(capsys)


def test_what_a_strategy_refuses_is_told_before_the_first_run(suite, capsys):  # noqa: F811
    suite["methods"] = {"Means": {"method": "nearest-class-mean", "adapter": {"head": "lda"}}}
    del suite["reference"]
    assert suite.run("--check") == 2
    assert "Means: it cannot be set up: Nearest class mean compares features" in told(capsys)


def test_names_of_any_script_and_length_have_folders(suite):  # noqa: F811
    del suite["reference"]
    suite["methods"] = dict.fromkeys(("日本語", "中文", "x" * 300, "x" * 301, "L2P (best)_a"), FROZEN)
    folders = [row.folder for row in read_suite(suite).rows]
    assert folders[:2] == ["日本語", "中文"] and folders[4] == "l2p-best-a"
    assert len(set(folders)) == 5 and max(len(each.encode()) for each in folders) <= 120


def test_published_rows_have_the_numbers_of_their_columns(suite):  # noqa: F811
    values = {"average-accuracy": 80.0, "trainable-parameters": 2718000}
    suite["published"] = [{"method": "P", "source": "s", "values": values}]
    suite["settings"] = {"scenario.kind": ["task-incremental", "class-incremental"]}
    suite["tables"] = [{"columns": list(values)}, {"columns": list(values), "across": "scenario.kind"}]
    read = read_suite(suite)
    plain, across = (make_table(read, Found(read), each) for each in read.tables)
    assert [(cell.text, cell.number) for cell in plain.rows[-1][-2:]] == [("80", 0.8), ("2718000", 2718000)]
    # A paper's figure says not of which of the columns it is.
    assert plain.published and not across.published


def test_the_page_has_no_number_where_there_is_none(suite):  # noqa: F811
    table = Table("T", ["A", "B"], [[Cell("a"), Cell("–", math.nan)], [Cell("b"), Cell("1", 1.0)]])
    shown = page(read_suite(suite), [table], [], [])
    assert re.findall(r'data-number="(.*?)"', shown) == ["1.0"]


# ---------------------------------------------------------------------------------------- nothing is lost, or hidden


def test_overwriting_removes_nothing_before_all_is_looked_at(suite, capsys):  # noqa: F811
    kept = suite.folder / "runs" / "joint" / "seed0.log"
    kept.parent.mkdir(parents=True)
    kept.write_text("hours of work")
    assert suite.run("--overwrite", "--check") == 0
    suite["methods"]["Broken"] = {"method": "l3p"}
    assert suite.run("--overwrite") == 2
    del suite["methods"]["Broken"]
    with open(kept.with_name("seed0.lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        capsys.readouterr()
        assert suite.run("--overwrite") == 2
        assert f"--overwrite would remove '{kept.with_name('seed0')}', which a process has in work" in told(capsys)
    assert kept.read_text() == "hours of work"


def test_a_failure_is_told_by_its_signal_and_its_last_attempt(suite):  # noqa: F811
    class Job:
        def ended(self):
            return -9

    each = Progress(read_suite(suite).runs[0], State.FAILED, Job(), log_before=6)
    log = each.run.file(".log")
    log.parent.mkdir(parents=True)
    log.write_text("first\nsecond\n")
    assert ending(each).startswith("ended by SIGKILL, as the system does where memory runs out; ")
    assert last_words(each) == "second"


def test_lines_on_a_terminal_never_wrap():
    assert fitted("Fine-tuning", 11) == "Fine-tuning" and fitted("Fine-tuning", 6) == "Fine-…"
    assert fitted("日本語", 6) == "日本語" and fitted("日本語", 5) == "日本…" and columns("日本…") == 5


# ---------------------------------------------------------------------------------------- --import


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:\n", "line 1: SyntaxError: "),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        ("\n\n1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_own_code_that_fails_is_told_with_its_line(tmp_path, code, message):
    path = tmp_path / "own_code.py"
    path.write_text(code)
    with pytest.raises(CommandError, match=re.escape(f"--import {path} fails in {path}, {message}")):
        import_all([str(path)])


def test_what_is_no_code_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CommandError, match="is 'photos', but that is a folder without code"):
        import_all(["photos"])
    with pytest.raises(CommandError, match=r"is 'suite.yaml', but there is no such module. Give the path of a file"):
        import_all(["suite.yaml"])
