"""One fault at a time, as a new user makes them on the command line: what is said, and that nothing is lost."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image as PILImage

from peft_cl import cli
from peft_cl.cli import main
from peft_cl.commands.errors import CommandError
from peft_cl.commands.output import plain_warnings
from peft_cl.commands.sections import DatasetSettings
from peft_cl.commands.sources import load_data
from peft_cl.commands.wording import for_the_command_line


@pytest.fixture
def photos(tmp_path):
    """A folder of photographs: four in each of three classes to learn, two to measure."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("bus", "car", "van"):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return tmp_path / "photos"


def of(photos, *words: str) -> tuple[str, ...]:
    return ("--dataset.path", str(photos), "--scenario.num_tasks", "3", "--scenario.seed", "null", *words)


def test_a_file_is_no_data_set(refused, photos):
    (photos.parent / "data").write_text("")
    assert "that is a file. Give the folder that it is in" in refused("--dataset.path", str(photos.parent / "data"))


@pytest.mark.parametrize("name", ["photos [1]", "a*", "p::q"])
def test_a_folder_whose_name_is_a_pattern(name, refused, photos):
    photos.rename(photos.parent / name)
    assert "have meanings of their own in such a path. Rename" in refused(*of(photos.parent / name))
    (photos.parent / name).rename(photos)
    assert load_data(DatasetSettings(str(photos)))  # the remedy


def test_a_revision_is_of_the_hub(refused, photos):
    assert "is a folder here, which has none. Leave it out" in refused(*of(photos, "--dataset.revision", "v2"))


def test_a_home_that_there_is_none_of(refused):
    assert "Correct dataset.path" in refused("--dataset.path", "~nobody-of-that-name/x")


def test_patterns_that_match_nothing_are_named(refused, photos):
    message = refused(*of(photos, "--dataset.data_files", "nothing/*.png"))
    assert "nothing/*.png" in message and "Correct dataset.data_files." in message


def test_files_that_are_no_images_and_links_to_nothing_are_named(photos):
    (photos / "train" / "bus" / "4.heic").write_bytes(b"not read")
    (photos / "train" / "bus" / "5.png").symlink_to("gone.png")
    (photos / "train" / "bus" / "notes.txt").write_text("no slip")
    with pytest.warns(UserWarning) as told:
        assert len(load_data(DatasetSettings(str(photos)))["train"]) == 12
    texts = [str(each.message) for each in told]
    assert any("1 file of" in text and "train/bus/4.heic. Convert them" in text for text in texts)
    assert any("Links to nothing" in text and "train/bus/5.png" in text for text in texts)
    assert not any("in none of the splits" in text for text in texts)


def test_zeros_in_front_of_labels_are_not_lost(photos, tmp_path):
    folder = tmp_path / "tables" / "train"
    shutil.copytree(photos / "train" / "bus", folder)
    table = folder / "metadata.csv"
    table.write_text("file_name,kind\n" + "".join(f"{number}.png,00{number + 1}\n" for number in range(4)))
    with pytest.raises(
        CommandError, match="label '001' in .*metadata.csv' would be read as a number, without its zeros"
    ):
        load_data(DatasetSettings(str(tmp_path / "tables"), label_column="kind"))
    table.write_text(table.read_text().replace(",00", ",kind_00"))  # the remedy
    data = load_data(DatasetSettings(str(tmp_path / "tables"), label_column="kind"))["train"]
    assert sorted(set(data["kind"])) == ["kind_001", "kind_002", "kind_003", "kind_004"]


def test_classes_without_test_images_are_told(photos, train, caplog):
    shutil.rmtree(photos / "test" / "van")
    logger = logging.getLogger("peft_cl.trainer.checks")
    logger.addHandler(caplog.handler)
    assert train(*of(photos, "--training.max_steps", "1", "--scenario.num_tasks", "1")) == 0
    logger.removeHandler(caplog.handler)
    assert "1 classes have no test images, so they are in no accuracy: ['van']" in caplog.text


def test_only_test_images_with_the_remedy(refused, train, photos, capsys):
    shutil.rmtree(photos / "train")
    message = refused(*of(photos))
    assert (
        "has no split 'train'; it has ['test']. Set dataset.test_fraction, for instance to 0.2, to divide" in message
    )
    both = ("--dataset.train_split", "test", "--dataset.test_fraction", "0.5")
    train_split, test_split = load_data(DatasetSettings(str(photos), train_split="test", test_fraction=0.5)).values()
    assert len(train_split) == len(test_split) == 3
    assert "very same data" not in refused(*of(photos, *both, "--scenario.num_tasks", "0"))


def test_a_sequence_of_data_sets_is_several(refused, photos):
    kind = ("--scenario.kind", "dataset-sequence", "--scenario.num_tasks", "null", "--scenario.seed", "null")
    message = refused(*kind, "--dataset", f"{{path: {photos}}}")
    assert "has the settings path of one data set" in message and "mnist: ylecun/mnist" in message
    message = refused(*kind, "--dataset", f"{{a: {photos}, b: {photos}}}")
    assert "dataset.a and dataset.b are the same data" in message or "dataset.b and dataset.a are" in message


def test_an_output_in_the_data(place, photos, capsys):
    words = ["train", str(place / "config.yaml"), *of(photos), "--output_dir", str(photos / "run")]
    assert main(words) == 2
    assert "which lies in the data" in capsys.readouterr().err


def test_values_that_a_library_refuses_are_named(refused):
    for name, value in (("eval_strategy", "epoh"), ("lr_scheduler_type", "cosin"), ("optim", "adam")):
        message = refused(f"--training.{name}", value)
        assert f"training.{name}" in message and value in message


def test_a_repeated_section_is_shown_where_it_is(place, tmp_path, capsys):
    text = (place / "config.yaml").read_text() + "\nscenario:\n  num_tasks: 4\n"
    (tmp_path / "twice.yaml").write_text(text)
    assert main(["train", str(tmp_path / "twice.yaml")]) == 2
    message = capsys.readouterr().err
    line = len(text.splitlines()) - 1
    assert "scenario stands there more than once. Take one out" in message and f"line {line}" in message
    assert "twice.yaml" in message and "unicode string" not in message


def test_a_model_that_is_none(refused, photos, place):
    assert "a folder without a config.json. Give the folder of a model" in refused("--model.name", str(photos))
    assert "that is a file" in refused("--model.name", str(place / "config.yaml"))
    assert "HF_HUB_OFFLINE is set" in refused("--model.name", "nobody/no-such-model")


def test_an_adapter_that_is_none(trained, place, photos, tmp_path, capsys):
    file, image = str(trained / "results.json"), str(photos / "test" / "bus" / "0.png")
    for words, expected in (
        (["info", file], "that is a file. Give the folder that the adapter is in"),
        (["predict", image, str(trained)], "The adapter comes first"),
        (["predict", str(trained), image, "--csv", image], "is no table. Give another name"),
    ):
        assert main(words) == 2
        assert expected in capsys.readouterr().err
    shutil.copytree(trained, tmp_path / "cut")
    (tmp_path / "cut" / "adapter_config.json").write_text('{"peft_type": "COD')
    assert main(["info", str(tmp_path / "cut")]) == 2
    assert "adapter_config.json is damaged" in capsys.readouterr().err.replace("'", "")
    assert PILImage.open(image).size == (16, 16)


def test_a_run_whose_state_is_lost_is_not_begun_anew(trained, place, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "_state")
    before = (tmp_path / "out" / "results.json").read_bytes()
    command = ["train", str(place / "config.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--resume"]) == 2
    message = capsys.readouterr().err
    assert "goes on from its state (_state), and that is gone" in message and "--overwrite" in message
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_nothing_to_resume_is_said(train, capsys):
    assert train("--resume", "--training.max_steps", "1") == 0
    assert "There is nothing to go on from in" in capsys.readouterr().out


def test_sums_that_are_gone_are_told_before_training(place, tmp_path, capsys):
    out = str(tmp_path / "out")
    config = str(place / "config.yaml")
    clear = ["--preset", "null", "--adapter", "null"]
    assert main(["train", config, *clear, "--method", "frozen", "--output_dir", out]) == 0
    (tmp_path / "out" / "head_sums.safetensors").unlink()
    capsys.readouterr()
    more = [*clear, "--method", "null", "--continue-from", out, "--output_dir", str(tmp_path / "more")]
    assert main(["train", config, *more]) == 2
    message = capsys.readouterr().err
    assert "there is no head_sums.safetensors" in message and "model.load_sums" not in message
    assert not (tmp_path / "more").exists()


def test_the_row_without_prompts_runs_from_a_folder(trained, tmp_path, capsys):
    """The command that a resumed run advises names the run's folder in the place of a configuration."""
    words = ["--method", "frozen", "--preset", "best", "--adapter", "null", "--output_dir", str(tmp_path / "frozen")]
    assert main(["train", str(trained), *words]) == 0
    assert "Frozen features" in json.loads((tmp_path / "frozen" / "results.json").read_text())["method"]


def test_an_interruption_while_the_program_is_loaded(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert main(["info", "x"]) == 130
    assert capsys.readouterr().err == "peft-cl: interrupted.\n"


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("Set train_mask=False.", "Set --adapter.train_mask False."),
        ("name another by label_column=.", "name another by --dataset.label_column."),
        ("Or set bad_images, of the training arguments, to 'check' to", "Or give --training.bad_images check to"),
        ("or train anew without resume_from_checkpoint.", "or begin anew with --overwrite."),
        ("examples.task_0: was 'ed0a', is '9b65'. Put", "the images of task_0 are others. Put"),
        ("loss=lambda logits, labels", "loss=lambda logits, labels"),
    ],
)
def test_remedies_are_said_for_the_command_line(python, shell):
    assert for_the_command_line(python) == shell
    if "label_column" in python:
        assert for_the_command_line(python, "evaluate") == "name another by --label-column."


def test_good_photos_are_told_nothing(photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_data(DatasetSettings(str(photos)))


def test_warnings_speak_of_the_command_line_too():
    with plain_warnings():
        text = warnings.formatwarning("Name the classes to use by class_order=.", UserWarning, "file", 1)
    assert text == "UserWarning: Name the classes to use by --scenario.class_order.\n"
