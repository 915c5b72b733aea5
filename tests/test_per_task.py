"""Each task its own epochs, rates and steps: applied, told, on record, and the same after an interruption."""

from __future__ import annotations

import json

import numpy as np
import pytest
from trainer_cases import CONFIGS
from transformers import HfArgumentParser, TrainerCallback

from peft_cl import ContinualTrainingArguments, RunResults, class_incremental, task_free
from peft_cl.commands.listing import list_tasks
from peft_cl.trainer.per_task import of_task
from peft_cl.trainer.snapshot import load_snapshot


class Watch(TrainerCallback):
    """Keeps the steps of each task, and the rate, batch and schedule that its optimizer begins with."""

    def __init__(self):
        self.steps, self.rates, self.batches, self.decays = [], [], [], []

    def on_train_begin(self, args, state, control, optimizer=None, train_dataloader=None, **kwargs):
        self.steps.append(state.max_steps)
        self.decays.append(max(group["weight_decay"] for group in optimizer.param_groups))
        self.rates.append({group["lr"] for group in optimizer.param_groups})
        self.batches.append(len(next(iter(train_dataloader))["labels"]))


def arguments(tmp_path, **words):
    return ContinualTrainingArguments(str(tmp_path), use_cpu=True, **words)


def test_a_long_first_task_and_rates_of_their_own(make_trainer):
    watch = Watch()
    per_task = {
        "first": {"num_train_epochs": 3, "weight_decay": 0.125},
        "later": {"learning_rate": 0.25, "learning_rates": {"head": 0.5}},
        2: {"max_steps": 5, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant_with_warmup"},
    }
    trainer = make_trainer(
        CONFIGS["coda"](),
        callbacks=[watch],
        per_task=per_task,
        num_train_epochs=1,
        learning_rate=0.125,
        lr_scheduler_type="constant",
    )
    before = dict(vars(trainer.args))
    trainer.train()
    assert watch.steps == [3 * 4, 4, 5]  # 32 images of a task, 8 in a step
    assert watch.rates == [{0.125}, {0.25, 0.5}, {0.25, 0.5}]
    assert watch.batches == [8, 8, 4] and watch.decays == [0.125, 0, 0]
    assert vars(trainer.args) == before

    settings = RunResults.load(trainer.folder).hyperparameters
    assert settings["num_train_epochs"] == [3, 1, 1] and settings["max_steps"] == [-1, -1, 5]
    assert settings["learning_rate"] == [0.125, 0.25, 0.25]
    assert settings["per_device_train_batch_size"] == [8, 8, 4]
    assert settings["lr_scheduler_type"] == ["constant", "constant", "constant_with_warmup"]
    assert settings["per_task"]["first"] == {"num_train_epochs": 3, "weight_decay": 0.125}
    assert settings["per_task"]["2"]["max_steps"] == 5


def test_a_task_without_settings_of_its_own_is_learnt_as_ever(make_trainer):
    matrices = []
    for per_task in (None, {"first": {"num_train_epochs": 2}}):  # which all tasks have
        trainer = make_trainer(CONFIGS["l2p"](), folder=f"run {per_task}", per_task=per_task)
        trainer.train()
        matrices.append(trainer.accuracy_matrix[~(trainer.accuracy_matrix != trainer.accuracy_matrix)].tolist())
    assert matrices[0] == matrices[1]


def test_the_closer_key_wins_setting_by_setting():
    per_task = {
        "later": {"learning_rate": 0.1, "num_train_epochs": 2},
        "2": {"learning_rate": 0.2, "max_steps": 50},
        "dogs": {"learning_rate": 0.3, "num_train_epochs": 9},
    }
    names = ["birds", "cars", "dogs"]
    assert of_task(per_task, 0, names) == {}
    assert {name: of_task(per_task, 1, names)[name] for name in per_task["later"]} == per_task["later"]
    own = of_task(per_task, 2, names)
    assert own["learning_rate"] == 0.3
    # The epochs of the closest key hold: steps of a wider one, which the Trainer goes by first, are put out of force.
    assert own["num_train_epochs"] == 9 and own["max_steps"] == -1


def test_epochs_of_a_task_hold_against_steps_of_all(make_trainer):
    watch = Watch()
    trainer = make_trainer(CONFIGS["linear-probe"](), max_steps=3, per_task={"1": {"num_train_epochs": 2}})
    trainer.add_callback(watch)
    trainer.train()
    assert watch.steps == [3, 8, 3]


def test_a_word_that_is_the_name_of_a_task_is_that_task():
    names = ["1", "0", "first"]
    assert of_task({"1": {"max_steps": 5}}, 0, names) == {"max_steps": 5}
    assert of_task({"1": {"max_steps": 5}}, 1, names) == {}
    assert of_task({"first": {"max_steps": 5}}, 0, names) == {}
    assert of_task({"first": {"max_steps": 5}}, 2, names) == {"max_steps": 5}


def test_a_rate_by_256_images_is_that_of_the_tasks_own_steps(make_trainer):
    watch = Watch()
    trainer = make_trainer(
        CONFIGS["linear-probe"](),
        callbacks=[watch],
        learning_rate_per_256=0.5,
        lr_scheduler_type="constant",
        per_task={
            0: {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            1: {"learning_rate": 0.25},  # in place of the scaled one
            2: {"learning_rate_per_256": 1.0, "per_device_train_batch_size": 16},
        },
    )
    trainer.train()
    assert watch.rates == [{0.5 * 16 / 256}, {0.25}, {1.0 * 16 / 256}]
    assert trainer.args.learning_rate == 0.5 * 8 / 256
    assert trainer.results.hyperparameters["learning_rate"] == [0.03125, 0.25, 0.0625]


def test_an_interrupted_run_goes_on_the_same(make_trainer):
    words = {"per_task": {"first": {"num_train_epochs": 1}, 1: {"learning_rate": 0.5, "max_steps": 6}}}
    words |= {"save_strategy": "steps", "save_steps": 2}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.max_steps == 6 and state.global_step == 5:
                raise KeyboardInterrupt

    class Count(TrainerCallback):
        steps = []

        def on_step_end(self, args, state, control, **kwargs):
            self.steps.append(state.global_step)

    whole = make_trainer(CONFIGS["coda"](), folder="whole", **words)
    whole.train()
    part = make_trainer(CONFIGS["coda"](), callbacks=[Stop()], **words)
    with pytest.raises(KeyboardInterrupt):
        part.train()
    assert part.args.max_steps == -1  # put back, however the task ended
    count = Count()
    again = make_trainer(CONFIGS["coda"](), callbacks=[count], **words)
    again.train(resume_from_checkpoint=True)
    assert count.steps == [5, 6, *range(1, 9)]  # from the checkpoint after four of six steps
    states = [load_snapshot(each.folder / "_state") for each in (whole, again)]
    assert states[0]["weights"].keys() == states[1]["weights"].keys()
    assert all(value.equal(states[1]["weights"][name]) for name, value in states[0]["weights"].items())
    np.testing.assert_array_equal(states[0]["accuracy_matrix"], states[1]["accuracy_matrix"])
    assert whole.results.hyperparameters["max_steps"] == again.results.hyperparameters["max_steps"] == [-1, 6, -1]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (None, "per_task: was .*, is None"),
        ({"1": {"learning_rate": 0.25}}, "per_task.1.learning_rate: was 0.5, is 0.25"),
        ({"1": {"learning_rate": 0.5}, "2": {"max_steps": 3}}, "per_task.2: was None, is .*max_steps.*3"),
    ],
)
def test_other_settings_of_tasks_are_another_run(now, said, make_trainer):
    first = make_trainer(CONFIGS["linear-probe"](), per_task={1: {"learning_rate": 0.5}})
    first.train_task(first.scenario[0])
    with pytest.raises(ValueError, match=f"cannot be resumed with other settings: {said}"):
        make_trainer(CONFIGS["linear-probe"](), per_task=now).train(resume_from_checkpoint=True)


def test_two_times_four_are_eight_only_where_no_task_has_steps_of_its_own(make_trainer):
    per_task = {"2": {"gradient_accumulation_steps": 4}}
    first = make_trainer(CONFIGS["linear-probe"](), per_task=per_task)
    first.train_task(first.scenario[0])
    words = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="per_device_train_batch_size: was 8, is 4"):
        make_trainer(CONFIGS["linear-probe"](), per_task=per_task, **words).train(resume_from_checkpoint=True)


def test_the_last_task_of_a_finished_run_goes_on_for_more_epochs_of_its_own(make_trainer):
    words = {"num_tasks": 2, "num_train_epochs": 1, "save_strategy": "epoch", "lr_scheduler_type": "constant"}
    whole = make_trainer(CONFIGS["coda"](), folder="whole", per_task={"1": {"num_train_epochs": 3}}, **words)
    whole.train()
    make_trainer(CONFIGS["coda"](), per_task={"1": {"num_train_epochs": 2}}, **words).train()
    watch = Watch()
    longer = make_trainer(CONFIGS["coda"](), callbacks=[watch], per_task={"1": {"num_train_epochs": 3}}, **words)
    longer.train(resume_from_checkpoint=True)
    assert watch.steps == [3 * 6]  # the last task alone was trained: 48 images of a task, 8 in a step
    assert longer.results.hyperparameters["num_train_epochs"] == [1, 3]
    assert longer.accuracy_matrix[1].tolist() == whole.accuracy_matrix[1].tolist()


def test_a_task_that_comes_later_is_one_of_the_later_ones(make_trainer, data):
    watch = Watch()
    trainer = make_trainer(
        CONFIGS["linear-probe"](),
        scenario=class_incremental(data, 2, class_order=["red", "green", "blue", "yellow"]),
        callbacks=[watch],
        per_task={"later": {"max_steps": 3}},
    )
    trainer.train()
    new = {split: part.filter(lambda row: row["label"] > 3) for split, part in data.items()}
    trainer.train_task(new, name="more")
    assert watch.steps == [8, 3, 3]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("per_task", "said"),
    [
        (5, r"per_task is 5, but must be settings by task, such as \{'first': \{'num_train_epochs': 20\}\}"),
        ({"0": 5}, "per_task of '0' is 5, but must be settings by name, such as"),
        ({True: {}}, "per_task has the key True, but a key must be a task's number"),
        ({1.5: {}}, "per_task has the key 1.5, but a key must be"),
        ({"0": {"seed": 1}}, "per_task of '0' names 'seed', but a task may have of its own num_train_epochs, .*"),
        ({"0": {"num_train_epochs": 0}}, "per_task of '0': num_train_epochs is 0, but must be a number above 0"),
        ({"0": {"learning_rate": "fast"}}, "per_task of '0': learning_rate is 'fast', but must be a number"),
        ({"0": {"learning_rates": {"body": 1}}}, "per_task of '0': learning_rates names 'body', but the parts are"),
        ({"0": {"lr_scheduler_type": "wave"}}, "per_task of '0': wave is not a valid SchedulerType, please select"),
        ({"0": {"warmup_steps": -1}}, "per_task of '0': warmup_steps is -1, but must be a number of at least 0"),
    ],
)
def test_bad_settings_are_named_before_any_training(per_task, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        arguments(tmp_path, per_task=per_task)


def test_a_task_that_there_is_none_of(make_trainer):
    for key, named in (("task_7", "'task_7'"), (3, "'3'")):
        with pytest.raises(
            ValueError, match=rf"per_task names {named}, but the tasks are \['task_0', 'task_1', 'task"
        ) as found:
            make_trainer(CONFIGS["coda"](), per_task={key: {"max_steps": 1}})
        assert "its number, 0 to 2, or take 'first' or 'later'" in str(found.value)
    make_trainer(CONFIGS["coda"](), per_task={"task_2": {"max_steps": 1}, 2: {}})


def test_a_stream_has_no_tasks(make_trainer, data):
    words = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "scenario": task_free(data, 3)}
    with pytest.raises(ValueError, match="per_task is .*but a stream has no tasks.*Leave per_task out"):
        make_trainer(CONFIGS["l2p"](), per_task={"first": {"learning_rate": 1}}, **words)
    make_trainer(CONFIGS["l2p"](), **words)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rates": {"attention": 0.1}}, "Of task 'task_1': learning_rates names attention, but this adapter"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "Of task 'task_1': lr_scheduler_type is 'cosine_with_min_lr'"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "Of task 'task_1': lr_scheduler_type='reduce_lr_on_plateau' would",
        ),
        ({"per_device_train_batch_size": 64}, "'task_1' has 32 training examples, fewer than one batch of 64"),
    ],
)
def test_what_a_task_cannot_be_learnt_with_is_told_with_its_name(values, said, make_trainer):
    with pytest.raises(ValueError, match=said):
        make_trainer(CONFIGS["l2p"](), dataloader_drop_last=True, eval_strategy="epoch", per_task={"1": values})


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_takes_it_and_lists_what_differs(train, capsys, tmp_path):
    per_task = "{first: {num_train_epochs: 2}, 1: {max_steps: 1}}"
    assert train("--training.per_task", per_task, "--training.per_task.1.learning_rate", "0.5") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    told = {line.partition(":")[0]: line for line in lines if line.startswith("task_")}
    assert told["task_0"].endswith("; num_train_epochs 2")
    assert told["task_1"].endswith("; max_steps 1, learning_rate 0.5")


def test_the_list_of_tasks_says_nothing_where_nothing_differs(data):
    scenario = class_incremental(data, 3)
    assert list_tasks(scenario, {"task_1": {"max_steps": 7}}).count(";") == 1
    assert list_tasks(scenario, None) == list_tasks(scenario)


def test_the_parser_of_transformers_leaves_the_arguments_as_they_are(tmp_path):
    """It writes types of its own into the fields of the class."""
    parser = HfArgumentParser(ContinualTrainingArguments)
    assert "--per_task" in parser.format_help()
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "--max_steps", "3"])
    assert args.max_steps == 3 and args.per_task is None
    assert arguments(tmp_path).max_steps == -1


def test_the_record_knows_it(tmp_path):
    both = arguments(tmp_path, per_task={0: {"max_steps": 1, "weight_decay": 0.5}, "0": {"max_steps": 2}})
    assert both.per_task == {"0": {"max_steps": 2, "weight_decay": 0.5}}
    args = arguments(tmp_path, per_task={0: {"lr_scheduler_type": "cosine", "learning_rates": {"keys": 1}}})
    assert json.loads(args.to_json_string())["per_task"] == args.per_task
    assert type(args.per_task["0"]["lr_scheduler_type"]) is str
