"""The temperature in runs: fitted after each task on validation images, on record, and the same after a resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_calibration import drawn
from test_own_metrics_kept import record
from trainer_cases import CONFIGS, images, whole_and_resumed
from transformers import TrainerCallback

from peft_cl import RunResults, class_incremental, task_free, task_incremental
from peft_cl.reliability import Calibration, fit_calibration
from peft_cl.trainer.snapshot import load_snapshot, save_snapshot


PROCESS = Path(__file__).with_name("sequence_process.py")


def half_wrong(per_class: int = 6):
    """Validation images of which some have another class of their task: no model can be sure of all of them."""
    return images(per_class, 5).map(
        lambda row, index: {"label": row["label"] ^ (index % 3 == 0)},  # tasks are (0, 1), (2, 3), (4, 5)
        with_indices=True,
    )


@pytest.fixture
def calibrated(make_trainer):
    """`calibrated(name, ...)`: a trainer that fits temperatures; further words are training arguments."""
    validation = half_wrong()

    def make(name="linear-probe", **words):
        settings = {"fit_temperature": True, "validation": validation, "num_train_epochs": 1, **words}
        return make_trainer(CONFIGS[name]() if isinstance(name, str) else name, **settings)

    return make


def temperature_of(trainer) -> float:
    return trainer.tuner.head.config.temperature


@pytest.mark.parametrize("name", ["linear-probe", "coda"])
def test_a_temperature_after_each_task(name, calibrated, tiny_vit, tmp_path, caplog):
    trainer = calibrated(name)
    trainer.train()
    plain = calibrated(name, folder="plain", fit_temperature=False)
    plain.train()
    # What is learnt and predicted is the same, to the digit.
    np.testing.assert_array_equal(trainer.accuracy_matrix, plain.accuracy_matrix)
    weights = plain.model.state_dict()
    assert all(torch.equal(value, weights[each]) for each, value in trainer.model.state_dict().items())
    found = [Calibration.from_dict(each) for each in trainer.results.calibration]
    assert [each.images for each in found] == [12, 24, 36] and all(0.05 < each.temperature < 100 for each in found)
    assert len({each.temperature for each in found}) == 3
    assert temperature_of(trainer) == found[-1].temperature and temperature_of(plain) == 1.0
    assert plain.results.calibration is None and "temperature was" not in caplog.text
    # By hand, on the logits of the trainer that fits none.
    output = [plain.predict(task).label_ids for task in plain.validation]
    batches = [batch for task in plain.validation for batch in plain.plain_batches(task, "test")]
    with torch.no_grad():
        logits = torch.cat([plain.model.eval()(pixel_values=batch["pixel_values"]).logits for batch in batches])
    by_hand = fit_calibration(logits, np.concatenate(output))
    assert found[-1].temperature == pytest.approx(by_hand.temperature, rel=1e-3)
    assert found[-1].before.nll == pytest.approx(by_hand.before.nll, rel=1e-3)
    # On disk.
    assert RunResults.load(tmp_path / "run").calibration == trainer.results.calibration
    assert trainer.results.hyperparameters["fit_temperature"] is True
    assert "temperature" not in trainer.results.hyperparameters["adapter"]
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "run")
    assert loaded.peft_config["default"].temperature == found[-1].temperature


def test_the_loss_of_the_test_is_that_of_the_scaled_logits(calibrated, data):
    trainer = calibrated(num_tasks=2)
    trainer.train()
    measured = trainer.evaluate()["eval_loss"]
    temperature, trainer.tuner.head.config.temperature = temperature_of(trainer), 1.0
    with torch.no_grad():
        parts = [
            (trainer.model(pixel_values=batch["pixel_values"]).logits / temperature, batch["labels"])
            for task in trainer.scenario
            for batch in trainer.plain_batches(task, "test")
        ]
    logits, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    assert measured == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)


def test_a_part_of_the_training_images_is_enough(make_trainer, caplog):
    trainer = make_trainer(CONFIGS["linear-probe"](), fit_temperature=True, validation_fraction=0.25, num_tasks=2)
    trainer.train()
    assert [each["images"] for each in trainer.results.calibration] == [12, 24]
    assert "neither learnt nor measured" not in caplog.text


def test_without_validation_images_it_is_refused(make_trainer):
    with pytest.raises(ValueError, match="fit_temperature is True, but there are no validation images.*Set valid"):
        make_trainer(CONFIGS["linear-probe"](), fit_temperature=True)
    make_trainer(CONFIGS["linear-probe"](), fit_temperature=True, validation_fraction=0.1)  # the remedies work
    trainer = make_trainer(CONFIGS["linear-probe"](), fit_temperature=True, validation=images(2, 5))
    trainer.validation = []
    with pytest.raises(ValueError, match="fit_temperature is True, but there are no validation images"):
        trainer.train()


def test_a_resumed_run_has_the_same_temperatures(calibrated):
    whole, resumed = whole_and_resumed(lambda **words: calibrated("coda", num_tasks=2, **words))
    assert resumed.results.calibration == whole.results.calibration
    assert temperature_of(resumed) == temperature_of(whole)
    done = calibrated("coda", num_tasks=2, folder="whole")
    done.train(resume_from_checkpoint=True)  # nothing is left to train
    assert temperature_of(done) == temperature_of(whole) != 1.0
    assert done.results.calibration == whole.results.calibration


@pytest.mark.slow
def test_a_run_that_was_interrupted_in_a_task(calibrated):
    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if kwargs["model"].base_model.head.config.num_tasks == 2:
                raise KeyboardInterrupt

    words = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2, "num_tasks": 2}
    whole = calibrated(folder="whole", **words)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        calibrated(callbacks=[Interrupt()], **words).train()
    resumed = calibrated(**words)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.results.calibration == whole.results.calibration


def test_it_is_not_switched_on_or_off_on_the_way(calibrated):
    first = calibrated()
    first.train_task(first.scenario[0])
    with pytest.raises(ValueError, match="fit_temperature: was True, is False"):
        calibrated(fit_temperature=False).train(resume_from_checkpoint=True)


def test_junk_in_a_snapshot_is_told(calibrated, tmp_path):
    first = calibrated()
    first.train_task(first.scenario[0])
    state = load_snapshot(tmp_path / "run" / "_state")
    state["learnt"][0]["calibration"]["temperature"] = "hot"
    save_snapshot(tmp_path / "run" / "_state", state)
    with pytest.raises(ValueError, match="calibration.temperature is 'hot'"):
        calibrated().train(resume_from_checkpoint=True)


def test_an_adapter_that_learns_on(calibrated, make_trainer, data, tiny_vit, tmp_path, caplog):
    parts = [
        {split: part.filter(lambda row, own=own: row["label"] in own) for split, part in data.items()}
        for own in ((0, 1), (2, 3))
    ]
    scenarios = [
        class_incremental(part, 1, class_order=names)
        for part, names in zip(parts, (["red", "green"], ["blue", "yellow"]), strict=True)
    ]
    wrong = half_wrong()
    validation = [wrong.filter(lambda row, own=own: row["label"] in own) for own in ((0, 1), (2, 3))]
    calibrated(scenario=scenarios[0], validation=validation[0]).train()

    def loaded() -> PeftModel:
        return PeftModel.from_pretrained(tiny_vit(), tmp_path / "run", is_trainable=True)

    again = calibrated(None, model=loaded(), scenario=scenarios[1], validation=validation[1], folder="on")
    again.train()
    first, second = again.results.calibration  # the first is of the record beside the adapter
    assert first == RunResults.load(tmp_path / "run").calibration[0] and second["images"] == 12
    assert "temperature was" not in caplog.text
    plain = make_trainer(None, model=loaded(), scenario=scenarios[1], num_train_epochs=1, folder="plain")
    plain.train()
    assert plain.results.calibration == [first, None] and temperature_of(plain) == 1.0
    assert "The adapter's temperature was" in caplog.text


def test_a_stream_is_calibrated_at_each_measurement(calibrated, data):
    trainer = calibrated("l2p", scenario=task_free(data, 2), lr_scheduler_type="constant", learning_rate=1e-3)
    trainer.train()
    assert [each["images"] for each in trainer.results.calibration] == [18, 36]
    assert temperature_of(trainer) == trainer.results.calibration[-1]["temperature"] != 1.0


def test_a_known_task_is_known_to_the_fit(calibrated, data):
    trainer = calibrated(scenario=task_incremental(data, 3))
    trainer.train()
    found = Calibration.from_dict(trainer.results.calibration[-1])
    # Of two classes each, the other tasks' being out of the question.
    assert found.before.accuracy > 0.4 and min(each for each in found.before.bins.confidence if each) > 0.5


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    for processes, folder in ((1, "one"), (2, "two")):
        words = [str(PROCESS), str(tmp_path / folder), "probe+temperature+uneven", "0", "anew"]
        if processes > 1:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLAIN": "1"}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment)
        assert done.stdout.splitlines()[-1:] == [f"processes {processes}"], done.stderr
    one, two = (RunResults.load(tmp_path / folder).calibration for folder in ("one", "two"))
    assert [each["images"] for each in two] == [each["images"] for each in one]
    for first, second in zip(one, two, strict=True):
        assert second["temperature"] == pytest.approx(first["temperature"], rel=1e-3)


# ----------------------------------------------------------------------------------------------- the record


def test_a_record_reads_back(tmp_path):
    rng = np.random.default_rng(0)
    facts = fit_calibration(rng.normal(size=(40, 3)), rng.integers(0, 3, 40)).to_dict()
    saved = record(calibration=[None, facts])
    assert RunResults.load(saved.save(tmp_path)) == saved
    assert "calibration" not in json.loads(record().save(tmp_path).read_text())  # as in older records
    assert RunResults.load(tmp_path).calibration is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "calibration is {}, but must be a list"),
        ([None], r"calibration has 1 entries, but finished_tasks is 2; give one for each"),
        ([None, {"temperature": math.nan}], r"calibration\[1\] is .* must be temperature, before, after, images"),
    ],
)
def test_a_record_of_junk_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        record(calibration=value)


def test_it_goes_to_json_and_back(tmp_path):
    found = fit_calibration(*drawn(rows=60))
    assert None in found.before.bins.accuracy  # an empty bin
    found.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == found
    assert json.loads((tmp_path / "calibration.json").read_text()) == found.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "calibration.temperature is -1"),
        ({"temperature": "hot"}, "calibration.temperature is 'hot', but must be a number"),
        ({"images": 1.5}, "calibration.images is 1.5, but must be a whole number"),
        ({"after": None}, "calibration.after is None, but must be values by name"),
        ({"more": 1}, "must be temperature, before, after, images by name"),
        ({"before": {"nll": 1, "ece": 2, "accuracy": 1, "bins": {}}}, "calibration.before.ece is 2"),
    ],
)
def test_junk_is_no_calibration(change, message):
    with pytest.raises(ValueError, match=message):
        Calibration.from_dict({**fit_calibration(*drawn(rows=60)).to_dict(), **change})


def test_bins_that_do_not_fit_are_junk():
    facts = fit_calibration(*drawn(rows=60)).to_dict()
    facts["before"]["bins"]["count"][-1] = 0
    with pytest.raises(
        ValueError, match="calibration.before.bins is .* must be a number for each bin that has images"
    ):
        Calibration.from_dict(facts)
