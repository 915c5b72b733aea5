"""What a run says: a line for each task and losses always, bars on a terminal alone."""

from __future__ import annotations

import re
import sys

import pytest
from peft import PeftModel
from trainer_cases import CONFIGS

from peft_cl import class_incremental, task_incremental


TASK = re.compile(
    r"task (\d) of (\d) \((\w+)\): accuracy \d+\.\d\d% \(chance (\d+\.\d\d)%\)"
    r"(, average accuracy \S+, forgetting \S+)?, \d+ s of training"
)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_run_into_a_file_has_lines_and_no_bars(disable_tqdm, make_trainer, capfd):
    trainer = make_trainer(CONFIGS["linear-probe"](), logging_steps=4)
    trainer.args.disable_tqdm = disable_tqdm
    trainer.train()
    written = capfd.readouterr()
    lines = written.out.splitlines()
    found = [TASK.fullmatch(line) for line in lines if "s of training" in line]
    assert [each.groups()[:4] for each in found] == [
        ("1", "3", "task_0", "50.00"),
        ("2", "3", "task_1", "25.00"),
        ("3", "3", "task_2", "16.67"),
    ]
    losses = [line for line in lines if "loss" in line]
    assert [line.partition(": ")[2].partition(",")[0] for line in losses] == ["step 4 of 8", "step 8 of 8"] * 3
    assert re.fullmatch(r"task 2 of 3 \(task_1\): step 4 of 8, loss \d\S*, learning rate \d\S*", losses[2])
    assert len(lines) == 9
    assert "\r" not in written.out + written.err and "it/s" not in written.err and "%|" not in written.err


def test_bars_on_a_terminal_have_the_losses_beside_them(make_trainer, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer = make_trainer(CONFIGS["linear-probe"](), num_tasks=2)
    trainer.progress.bars = True
    trainer.train()
    written = capfd.readouterr()
    assert "tasks (task_1):" in written.err and "evaluation" in written.err
    lines = [line for line in written.out.splitlines() if line.strip()]
    assert len(lines) == 2 and all(TASK.fullmatch(line.strip()) for line in lines)


def test_numbers_of_tasks_go_on_with_the_adapter(make_trainer, tiny_vit, data, tmp_path, capfd):
    words = {"num_train_epochs": 1, "logging_strategy": "no"}
    scenario = class_incremental(data, 2, class_order=["red", "green", "blue", "yellow"])
    make_trainer(CONFIGS["linear-probe"](), scenario=scenario, **words).train()
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "run", is_trainable=True)
    capfd.readouterr()
    later = class_incremental(data, 1, class_order=["cyan", "magenta"])
    make_trainer(None, model=model, scenario=later, folder="on", **words).train()
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("task 3 of 3 (task_2): accuracy ")
    assert "(chance 16.67%), average accuracy not measured, forgetting not measured" in line


def test_chance_is_among_the_classes_that_are_in_question(make_trainer, data, capfd):
    make_trainer(CONFIGS["linear-probe"](), scenario=task_incremental(data, 3), max_steps=1).train()
    assert capfd.readouterr().out.count("(chance 50.00%)") == 3


def test_a_task_by_itself_has_its_line_too(make_trainer, capfd):
    trainer = make_trainer(CONFIGS["linear-probe"](), max_steps=1, logging_strategy="no")
    trainer.train_task(trainer.scenario[0])
    assert TASK.fullmatch(capfd.readouterr().out.strip())


def test_the_command_writes_no_bars_into_a_file(train, capfd):
    assert train("--training.disable_tqdm", "false") == 0
    written = capfd.readouterr()
    assert "task 2 of 2 (task_1): accuracy" in written.out
    assert "%|" not in written.err and "\r" not in written.err
