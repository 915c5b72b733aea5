"""What images are taken for: by the command, by the trainer without labels, and in Python, always by name."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from peft import PeftModel
from PIL import Image
from trainer_cases import CONFIGS
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_cl import RunResults, class_incremental, classify
from peft_cl.cli import main
from peft_cl.scenarios import ContinualCollator, ImageTransform


@pytest.fixture
def photos(place, tmp_path):
    """A folder of 8 images in two folders, of known classes."""
    data = load_dataset(str(place / "data"))["test"]
    names = data.features["label"].names
    for row in range(0, 16, 2):
        folder = tmp_path / "photos" / str(row % 2)
        folder.mkdir(parents=True, exist_ok=True)
        data[row]["image"].save(folder / f"{names[data[row]['label']]}_{row}.png")
    return tmp_path / "photos"


def test_a_folder_becomes_a_table_of_names(place, trained, photos, tmp_path, capsys) -> None:
    assert main(["predict", str(trained), str(photos), "--csv", str(tmp_path / "new" / "t.csv"), "--top-k", "2"]) == 0
    assert "8 of 8 images predicted" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "new" / "t.csv").open()))
    assert list(rows[0]) == ["file", "task", "class_1", "probability_1", "class_2", "probability_2"]
    results = RunResults.load(trained)
    order, task_of = results.scenario["class_order"], {}
    for number, name in enumerate(order):
        task_of[name] = results.task_names[number // 2]
    model = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(place / "model"), str(trained)
    ).eval()
    processor = AutoImageProcessor.from_pretrained(str(trained))
    files = sorted(photos.rglob("*.png"))
    expected = classify(model, [Image.open(file) for file in files], processor, top_k=2)
    for row, file, prediction in zip(rows, files, expected, strict=True):
        assert row["file"] == str(file) and (row["class_1"], row["class_2"]) == prediction.names
        assert float(row["probability_1"]) == pytest.approx(prediction.probabilities[0], abs=1e-5)
        assert row["task"] == task_of[row["class_1"]] == results.task_names[prediction.task]


def test_an_image_is_named_with_its_probabilities(trained, photos, capsys) -> None:
    file = sorted(photos.rglob("*.png"))[0]
    assert main(["predict", str(trained), str(file)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(str(file)) and "(task task_" in first
    assert len(lines) == 4  # all classes, fewer than five
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3)


def test_what_cannot_be_read_is_named_and_passed_over(trained, photos, tmp_path, capsys) -> None:
    (photos / "empty.jpg").touch()
    whole = sorted(photos.rglob("*.png"))[0].read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "text\x1b[31m.png").write_text("no image")
    (photos / "notes.txt").write_text("passed over without a word: it is not called an image")
    assert main(["predict", str(trained), str(photos), "--csv", str(tmp_path / "t.csv"), "--batch-size", "3"]) == 1
    printed = capsys.readouterr()
    for name in ("empty.jpg", "cut.png", "text\\x1b[31m.png"):
        assert f"{name} is passed over" in printed.err
    assert "8 of 11 images predicted, 3 passed over" in printed.err and "notes" not in printed.err
    assert len(list(csv.reader((tmp_path / "t.csv").open()))) == 9


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere.jpg"], "There is no image or folder 'nowhere.jpg'"),
        (["EMPTY"], "holds no image"),
        (["PHOTOS", "--top-k", "0"], "--top-k is 0"),
        (["PHOTOS", "--batch-size", "0"], "--batch-size is 0"),
        (["PHOTOS", "--csv", "EMPTY"], "cannot be written to"),
    ],
)
def test_what_cannot_be_predicted_is_refused(trained, photos, tmp_path, capsys, words, expected) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "PHOTOS": str(photos)}
    assert main(["predict", str(trained), *(places.get(word, word) for word in words)]) == 2
    assert expected in capsys.readouterr().err


def test_the_trainer_predicts_images_without_labels(make_trainer, data) -> None:
    order = ["cyan", "red", "magenta", "blue", "yellow", "green"]  # another than the data's
    scenario = class_incremental(data, num_tasks=3, class_order=order)
    trainer = make_trainer(CONFIGS["coda"](), scenario=scenario, num_train_epochs=1)
    trainer.train()
    labelled = trainer.predict(data["test"])
    for images in (data["test"].remove_columns("label"), Dataset.from_dict({"image": data["test"]["image"]})):
        found = trainer.predict(images)
        assert found.label_ids is None and found.names == labelled.names
        np.testing.assert_array_equal(found.predictions, labelled.predictions)
    names = data["test"].features["label"].names
    truth = [names[label] for label in data["test"]["label"]]
    accuracy = np.mean(np.array(labelled.names) == truth)
    assert accuracy == pytest.approx(labelled.metrics["test_accuracy"]) and accuracy > 0.3
    assert labelled.names == [order[row] for row in labelled.predictions]
    pictures = data["test"]["image"][:5]
    named = [each.names[0] for each in classify(trainer.model, pictures, trainer.processing_class)]
    assert named == labelled.names[:5]
    # The labels matter again afterwards.
    assert trainer.evaluate(data["test"])["eval_accuracy"] == pytest.approx(accuracy)


def test_a_missing_column_is_named_with_a_remedy_that_works(data, processor) -> None:
    scenario = class_incremental(data, num_tasks=3)
    collator = ContinualCollator(ImageTransform(processor), scenario.label_index())
    rows = [data["test"][0]]
    with pytest.raises(ValueError, match="not 'image'.*rename_column"):
        collator([{"picture": rows[0]["image"], "label": 0}])
    with pytest.raises(ValueError, match="not 'label'"):
        collator([{"image": rows[0]["image"]}])
