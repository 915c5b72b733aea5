"""The page's table of what PEFT can do with our methods is what the script finds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"


@pytest.fixture(scope="module")
def capabilities():
    spec = importlib.util.spec_from_file_location("capabilities", ROOT / "benchmarks" / "capabilities.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of_the_page(capabilities) -> list[str]:
    found = re.search(f"{capabilities.BEGIN}\n(.*?)\n{capabilities.END}", PAGE.read_text(), re.S)
    return found[1].splitlines()


def test_the_table_has_a_line_for_each_capability(capabilities):
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines_of_the_page(capabilities)[2:]]
    assert names == [*capabilities.CAPABILITIES, *capabilities.SLOW]


def test_the_cheap_lines_are_what_is_found(capabilities):
    assert lines_of_the_page(capabilities)[2:][: len(capabilities.CAPABILITIES)] == capabilities.rows(
        capabilities.CAPABILITIES
    )


@pytest.mark.slow
def test_the_others_too(capabilities):
    assert lines_of_the_page(capabilities)[-len(capabilities.SLOW) :] == capabilities.rows(capabilities.SLOW)


def test_a_wrong_answer_is_no_refusal(capabilities):
    """A result that is not right ends the script; it does not become a "no"."""
    with pytest.raises(AssertionError):
        capabilities.tried(lambda method: capabilities.same(capabilities.IMAGES, capabilities.IMAGES + 1), "L2P")
    assert capabilities.tried(capabilities.merge, "L2P").startswith("Prompts are extra tokens of the attention")
