"""The example scripts need what the documented install brings, and no more."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from peft_cl.commands.digits import draw_digits_dataset


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("class_incremental", r"digit \d, predicted \d", marks=pytest.mark.slow),
        ("custom_backbone", r"on I-JEPA: (\d+\.\d)% of the digits"),
        ("custom_head", r"naive Bayes: (\d+\.\d)% of the digits"),
    ],
)
def test_without_scikit_learn(name, expected, tmp_path, capsys, monkeypatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"] + ["sklearn"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(expected, capsys.readouterr().out)


def test_drawn_digits_are_the_same_each_time() -> None:
    first, again = (draw_digits_dataset(per_digit=4) for _ in range(2))
    assert first["train"][3]["image"].tobytes() == again["train"][3]["image"].tobytes()
    assert first["train"].num_rows == 30 and first["test"].features["label"].names == [str(n) for n in range(10)]
