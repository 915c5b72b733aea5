"""What is logged: the terms of the loss, task by task, in steps that go on."""

from __future__ import annotations

import pytest
from trainer_cases import CONFIGS
from transformers import TrainerCallback


def test_loss_terms_are_logged_one_by_one(make_trainer):
    logged = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    make_trainer(CONFIGS["l2p"](), callbacks=[Watch()]).train()
    steps = [entry for entry in logged if "pull" in entry]
    assert len(steps) == 3 * 8  # three tasks of 32 images, batch 8, two epochs
    assert {entry["task"] for entry in steps} == {0, 1, 2}
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["pull"], abs=2e-4)


def test_logged_steps_go_on_from_task_to_task_and_after_a_resume(make_trainer):
    """What `report_to` draws: each point has a place of its own, and the same in a run that was interrupted."""

    class Watch(TrainerCallback):
        def __init__(self, stop=None):
            self.logged, self.stop = [], stop

        def on_log(self, args, state, control, logs=None, **kwargs):
            kind = next((name for name in ("loss", "eval_loss", "train_loss") if name in logs), None)
            self.logged.append((logs["task"], state.global_step, kind))
            assert state.log_history[-1]["step"] == state.global_step

        def on_step_begin(self, args, state, control, **kwargs):
            assert state.global_step < 4  # a task's own
            if self.stop == self.logged[-1:]:
                raise KeyboardInterrupt

    words = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = Watch()
    make_trainer(CONFIGS["linear-probe"](), callbacks=[whole], folder="whole", **words).train()
    kinds = [(2, "loss"), (4, "loss"), (4, "train_loss"), (4, "eval_loss")]
    assert whole.logged == [(task, 4 * task + step, kind) for task in range(3) for step, kind in kinds]

    first, second = Watch(stop=[(1, 6, "loss")]), Watch()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(CONFIGS["linear-probe"](), callbacks=[first], **words).train()
    make_trainer(CONFIGS["linear-probe"](), callbacks=[second], **words).train(resume_from_checkpoint=True)
    assert first.logged + second.logged[1:] == whole.logged and second.logged[0] == (1, 6, "loss")


def test_logged_terms_are_of_one_task(make_trainer):
    logged = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    make_trainer(
        CONFIGS["l2p"](), callbacks=[Watch()], logging_steps=3, max_steps=5
    ).train()  # two steps are left over
    steps = [entry for entry in logged if "pull" in entry]
    assert [entry["task"] for entry in steps] == [0, 1, 2]
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["pull"], abs=2e-4)
