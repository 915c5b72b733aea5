"""`peft-cl calibrate`: the temperature goes into the adapter's folder, and evaluations are the same but for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from peft_cl import RunResults
from peft_cl.cli import main
from peft_cl.commands.own_split import TEST, TRAINING, own_split
from peft_cl.commands.sections import DatasetSettings
from peft_cl.reliability import Calibration


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(trained, tmp_path / "run")


def settings_of(adapter: Path) -> dict:
    return json.loads((adapter / "adapter_config.json").read_text())


def calibrate(adapter: Path, place: Path, *words: str) -> int:
    """On images that are neither learnt nor tested on."""
    return main(["calibrate", str(adapter), "--dataset", str(place / "single"), "--split", "train", *words])


def test_the_temperature_goes_into_the_adapter(adapter, place, capsys):
    before, weights = settings_of(adapter), (adapter / "adapter_model.safetensors").read_bytes()
    evaluation = ["evaluate", str(adapter), "--dataset", str(place / "data"), "--json"]
    assert main(evaluation) == 0
    plain = capsys.readouterr().out
    assert calibrate(adapter, place) == 0
    captured = capsys.readouterr()
    found, after = Calibration.load(adapter / "calibration.json"), settings_of(adapter)
    assert after == {**before, "temperature": found.temperature, "format_version": 3} and found.temperature != 1
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights
    assert min(Image.open(adapter / "reliability.png").size) > 600
    assert not [each for each in adapter.iterdir() if ".tmp" in each.name]
    assert found.images == 40 and found.after.images == 20 and "Warning" not in captured.err
    for words in (
        f"{adapter} on {place / 'single'}, train: 40 images",
        f"temperature {found.temperature:.4f}, fitted on all of them",
        f"NLL                {found.before.nll:8.4f}  {found.after.nll:8.4f}",
        f"calibration error  {found.before.ece:8.2%}  {found.after.ece:8.2%}",
        "(measured on 20 images, with a temperature fitted on the other 20)",
        f"adapter_config.json, calibration.json, reliability.png are in {adapter}.",
    ):
        assert words in captured.out
    assert main(evaluation) == 0  # predictions are the same
    assert capsys.readouterr().out == plain


def test_it_is_fitted_anew_from_the_logits_without_one(adapter, place, capsys):
    words = ("--measure-on-all", "--no-pictures", "--json")
    assert calibrate(adapter, place, *words) == 0
    first = json.loads(capsys.readouterr().out)
    assert calibrate(adapter, place, *words, "--batch-size", "7") == 0
    second = json.loads(capsys.readouterr().out)
    assert second["temperature"] == pytest.approx(first["temperature"], rel=1e-4)
    assert sum(second["after"]["bins"]["count"]) == second["images"] == 40
    assert (second["dataset"], second["split"], second["left_out"]) == (str(place / "single"), "train", 0)
    assert not (adapter / "reliability.png").exists()


@pytest.mark.parametrize(
    ("split", "expected"), [("test", "own test split on record"), ("train", "own training split")]
)
def test_its_own_images_are_warned_of(split, expected, adapter, place):
    words = ["--dataset", str(place / "data"), "--split", split, "--no-pictures"]
    with pytest.warns(UserWarning, match=f"The split '{split}' is the adapter's {expected}.*Give other images"):
        assert main(["calibrate", str(adapter), *words]) == 0


def test_classes_without_images_are_warned_of(adapter, place, tmp_path, capsys):
    some = load_dataset("parquet", data_files=str(place / "single" / "train.parquet"), split="train")
    (tmp_path / "some").mkdir()
    some.filter(lambda row: row["label"] < 2).to_parquet(tmp_path / "some" / "dev.parquet")
    command = ["calibrate", str(adapter), "--dataset", "parquet", "--data-files", str(tmp_path / "some" / "*.parquet")]
    with pytest.warns(UserWarning, match=r"2 of the 4 classes learnt have no image here \(.*Give images of all"):
        assert main([*command, "--split", "dev", "--no-pictures"]) == 0
    assert "dev: 20 images" in capsys.readouterr().out


def test_a_task_incremental_adapter_is_told_the_tasks(train, place, tmp_path, capsys):
    assert train("--scenario.kind", "task-incremental") == 0
    capsys.readouterr()
    assert calibrate(tmp_path / "out", place, "--no-pictures", "--measure-on-all", "--json") == 0
    bins = json.loads(capsys.readouterr().out)["before"]["bins"]
    assert min(each for each in bins["confidence"] if each) >= 0.5  # of two classes each


def test_a_network_for_each_task(train, place, tmp_path, capsys):
    words = ["--method", "fine-tuning", "--preset", "null", "--strategy", "packnet"]
    assert train(*words, "--adapter", "{train_mask: true}", "--scenario.kind", "task-incremental") == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--dataset", str(place / "data"), "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    command = ["calibrate", str(tmp_path / "out"), "--dataset", str(place / "data"), "--split", "test"]
    with pytest.warns(UserWarning, match="own test split"):
        assert main([*command, "--no-pictures", "--measure-on-all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["accuracy"] == found["after"]["accuracy"] == pytest.approx(accuracy)
    assert settings_of(tmp_path / "out")["temperature"] == found["temperature"]


def test_a_run_of_a_configuration_fits_it_too(train, place, tmp_path, capsys):
    words = ("--training.fit_temperature", "true")
    assert train(*words) == 2
    said = capsys.readouterr().err
    assert "fit_temperature is True, but there are no validation images" in said
    assert train(*words, "--training.validation_fraction", "0.25") == 0
    calibration = RunResults.load(tmp_path / "out").calibration
    assert settings_of(tmp_path / "out")["temperature"] == calibration[-1]["temperature"]
    assert (tmp_path / "out" / "reliability.png").is_file()
    (tmp_path / "out" / "calibration.json").write_text("{}")
    assert train("--overwrite") == 0  # nothing of the run before is left
    assert not (tmp_path / "out" / "reliability.png").exists() and not (tmp_path / "out" / "calibration.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--split", "dev"], "has no split 'dev'; it has ['train', 'test']. Set --split"),
        (["--split", "test", "--batch-size", "0"], "--batch-size is 0, but must be at least 1"),
        (["--split", "test", "--label-column", "kind"], "cannot be used"),
    ],
)
def test_a_wrong_command_is_refused(adapter, place, capsys, words, expected):
    before = settings_of(adapter)
    assert main(["calibrate", str(adapter), "--dataset", str(place / "data"), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("peft-cl: ") and expected in line
    assert settings_of(adapter) == before and not (adapter / "calibration.json").exists()


def test_only_a_folder_is_written_into(place, capsys):
    assert main(["calibrate", "owner/adapter", "--dataset", str(place / "data"), "--split", "test"]) == 2
    assert "There is no folder 'owner/adapter', and the temperature is written" in capsys.readouterr().err


def test_the_split_must_be_named(adapter, place, capsys):
    """The usual default, the test split, is the one that must not be taken."""
    with pytest.raises(SystemExit):
        main(["calibrate", str(adapter), "--dataset", str(place / "data")])
    assert "required: --split" in capsys.readouterr().err


def test_which_split_it_is(trained, place):
    record, data = RunResults.load(trained), str(place / "data")

    def found(record=record, images=20, **settings):
        return own_split(record, DatasetSettings(**{"path": data, **settings}), images)

    assert found(test_split="test") == TEST and found(test_split="train") == TRAINING
    assert found(test_split="validation") is None and found(path=str(place / "single")) is None
    assert found(test_split="test", path=f"{data}/../data") == TEST
    assert found(test_fraction=0.2) is None  # a part of what it learnt, and not of what it was tested on
    divided = {"path": data, "test_fraction": 0.2, "split_seed": 1}
    divided = replace(record, hyperparameters={"data": divided})
    assert found(divided, test_fraction=0.2, split_seed=1) == TEST
    assert found(divided, test_fraction=0.2, split_seed=2) is None
    several = replace(record, hyperparameters={"data": {"first": {"path": data}, "second": {"path": "other"}}})
    assert found(several, test_split="test") == TEST and found(several, path="third") is None
    in_python = replace(record, hyperparameters={}, dataset="data")
    assert found(in_python) == TEST and found(in_python, images=19) is None and found(None) is None
