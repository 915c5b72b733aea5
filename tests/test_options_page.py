"""docs/options.md: its lines run, and it names every option of the pools."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import peft_cl
from peft_cl.tuners.base.pool_config import PoolConfig


PAGE = (Path(__file__).parents[1] / "docs" / "options.md").read_text()
LINES = re.findall(r"`((?:L2P|DualPrompt|CodaPrompt)Config[.(].*?)` \|", PAGE)


def test_the_page_has_its_lines():
    assert len(LINES) > 45 and len(set(LINES)) == len(LINES)


@pytest.mark.parametrize("line", LINES)
def test_a_line_runs(line):
    names = {name: getattr(peft_cl, name) for name in peft_cl.__all__}
    config = eval(line, names)
    for keyword in ast.parse(line, mode="eval").body.keywords:
        assert getattr(config, keyword.arg) == eval(ast.unparse(keyword.value), names)


def test_every_option_of_all_pools_is_on_the_page():
    before = {each.name for each in fields(peft_cl.tuners.PromptPoolConfig)}
    for each in fields(PoolConfig):
        if each.name not in before | {"grown", "init_noise", "joined", "joined_prompts"}:
            assert re.search(rf"\b{each.name}\b", PAGE), each.name
