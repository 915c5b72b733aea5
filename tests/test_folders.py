"""Folders of images: splits, classes with the names of splits, and images that are in both."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image, load_dataset, load_from_disk
from PIL import Image as PILImage

from peft_cl import class_incremental, domain_incremental, task_free
from peft_cl.cli import main
from peft_cl.commands.errors import CommandError
from peft_cl.commands.sections import DatasetSettings
from peft_cl.commands.sources import load_data, load_pair


@pytest.fixture
def folder(tmp_path):
    """`folder("train/bus", "test/bus", ...)`: a folder of images, three noisy ones in each."""
    rng = np.random.default_rng(0)

    def make(*places: str, names=("0.png", "1.png", "2.png")):
        for place in places:
            (tmp_path / "d" / place).mkdir(parents=True, exist_ok=True)
            for name in names:
                noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                PILImage.fromarray(noise).save(tmp_path / "d" / place / name)
        return tmp_path / "d"

    return make


def found(data: Dataset) -> set[str]:
    """Class and folder of each image."""
    names = data.features["label"].names
    paths = data.cast_column("image", Image(decode=False))["image"]
    return {
        f"{names[label]}: {'/'.join(path['path'].split('/d/')[1].split('/')[:-1])}"
        for label, path in zip(data["label"], paths, strict=True)
    }


@pytest.mark.parametrize("name", ["train", "test", "val", "eval", "training set", "test-bench", "dev.kit", "2 train"])
def test_a_class_named_like_a_split_stays_in_its_split(name, folder):
    place = folder("train/bus", f"train/{name}", "test/bus", f"test/{name}")
    train, test = load_pair(DatasetSettings(str(place)))
    assert found(train) == {"bus: train/bus", f"{name}: train/{name}"} and len(train) == 6
    assert found(test) == {"bus: test/bus", f"{name}: test/{name}"} and len(test) == 6


@pytest.mark.parametrize("name", ["train", "test", "validation"])
def test_classes_alone_are_no_splits(name, folder):
    place = folder("bus", name)
    data = load_data(DatasetSettings(str(place), test_fraction=0.34))
    assert found(data["train"]) == found(data["test"]) == {"bus: bus", f"{name}: {name}"}


def test_files_named_like_splits_are_no_splits(folder):
    place = folder("bus", "car", names=("train-1.png", "test 1.png", "eval.png", "3.png"))
    data = load_data(DatasetSettings(str(place), test_fraction=0.5))
    assert (len(data["train"]), len(data["test"])) == (4, 4)


def test_a_folder_of_splits_by_other_words(folder):
    place = folder("training/bus", "training/car", "val/bus", "val/car")
    train, test = load_pair(DatasetSettings(str(place), test_split="validation"))
    assert found(train) == {"bus: training/bus", "car: training/car"}
    assert found(test) == {"bus: val/bus", "car: val/car"}


@pytest.mark.parametrize("more", ["extra/cat", "extra", "train"])
def test_folders_that_are_left_out_are_named(more, folder):
    place = folder("train/bus", "train/car", "test/bus", "test/car", more)
    with pytest.warns(UserWarning, match=rf"in none of the splits .* is left out, 3 images of .*: {more} \(3\)"):
        train, _ = load_pair(DatasetSettings(str(place)))
    assert found(train) == {"bus: train/bus", "car: train/car"}


@pytest.mark.parametrize("places", [["."], ["train", "test"], ["train"]])
def test_images_without_class_folders_are_refused_with_a_layout(places, folder):
    with pytest.raises(CommandError, match="without folders for their classes.* FOLDER/train/cat/1.jpg.*metadata.csv"):
        load_pair(DatasetSettings(str(folder(*places))))


def test_metadata_says_the_labels(folder):
    for split in ("train", "test"):
        place = folder(split)
        lines = ["file_name,kind", *(f"{n}.png,{'ab'[n % 2]}" for n in range(3))]
        (place / split / "metadata.csv").write_text("\n".join(lines))
    train, _ = load_pair(DatasetSettings(str(place), label_column="kind"))
    assert train["kind"] == ["a", "b", "a"]


def test_one_file_in_both_splits_is_refused_in_python(folder):
    place = folder("train/bus", "train/train", "test/bus", "test/train")
    data = load_dataset("imagefolder", data_dir=str(place))
    message = r"3 of 6 test images are training images too, the same files \(in .*test/train\).*data_files="
    for make in (class_incremental, task_free):
        with pytest.raises(ValueError, match=message):
            make(data, 2)
    # what the message says
    files = {"train": f"{place}/train/**", "test": f"{place}/test/**"}
    scenario = class_incremental(load_dataset("imagefolder", data_files=files), 2)
    assert [len(task.train) for task in scenario] == [3, 3]


def noisy(count: int, seed: int, first: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    images = [PILImage.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(first + count)][
        first:
    ]
    return Dataset.from_dict(
        {"image": images, "label": [n % 2 for n in range(count)], "domain": ["a", "b"] * (count // 2)},
        features=Features(
            {"image": Image(), "label": ClassLabel(names=["a", "b"]), "domain": ClassLabel(names=["a", "b"])}
        ),
    )


@pytest.mark.parametrize(
    "make", [lambda data: class_incremental(data, 2), domain_incremental, lambda data: task_free(data, 2)]
)
def test_equal_bytes_are_refused(make, tmp_path):
    train, test = noisy(8, 0), noisy(8, 0, first=6)  # two images in common
    with pytest.raises(ValueError, match="2 of 8 test images are training images too, to the byte.*train_test_split"):
        make((train, test))
    train.save_to_disk(tmp_path / "train")
    with pytest.raises(ValueError, match="2 of 8 test images"):
        make(
            {
                "train": load_from_disk(tmp_path / "train").shuffle(seed=1),
                "test": test.select([7, 6, 5, 4, 3, 2, 1, 0]),
            }
        )
    make((train.select(range(6)), test))


def test_a_few_equal_ones_are_left_out_of_training():
    train, test = noisy(6, 0), noisy(200, 1)
    with_one = Dataset.from_dict(
        {name: [*train[name][:], test[3][name]] for name in train.column_names}, features=train.features
    )
    for make in (class_incremental, task_free):
        with pytest.warns(UserWarning, match="1 of 200 test images .* 1 training images are left out"):
            scenario = make((with_one, test), 1)
        assert len(scenario[0].train) == 6 and len(scenario[0].test) == 200


def test_images_of_one_colour_are_equal_by_chance():
    white = [PILImage.new("L", (8, 8), 255)] * 4
    data = Dataset.from_dict({"image": white, "label": ["a", "b"] * 2}).cast_column("image", Image())
    assert len(class_incremental((data, data.select([0, 1])), 1)[0].train) == 4


def test_copies_of_files_are_found(folder):
    place = folder("train/a", "train/b", "test/a", "test/b")
    (place / "test" / "a" / "9.png").write_bytes((place / "train" / "a" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="1 of 7 test images are training images too, to the byte"):
        class_incremental(load_dataset("imagefolder", data_dir=str(place)), 2)


@pytest.fixture
def configuration(place, tmp_path):
    def write(dataset):
        config = yaml.safe_load((place / "config.yaml").read_text())
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**config, "dataset": dataset, "output_dir": str(tmp_path / "out")}))
        return str(path)

    return write


def test_the_command_refuses_copies_in_one_line(folder, configuration, capsys):
    place = folder("train/a", "train/b", "test/a", "test/b")
    for name in ("0.png", "1.png"):
        (place / "test" / "a" / name).write_bytes((place / "train" / "a" / name).read_bytes())
    assert main(["train", configuration(str(place))]) == 2
    assert "2 of 6 test images are training images too" in capsys.readouterr().err


def test_a_folder_of_save_to_disk(place, tmp_path):
    data = load_dataset(str(place / "data"))
    data.save_to_disk(tmp_path / "whole")
    data["train"].save_to_disk(tmp_path / "one")
    train, test = load_pair(DatasetSettings(str(tmp_path / "whole")))
    assert (len(train), len(test)) == (len(data["train"]), len(data["test"]))
    train, test = load_pair(DatasetSettings(str(tmp_path / "one"), test_fraction=0.25))
    assert (len(train), len(test)) == (24, 8)
    with pytest.raises(
        CommandError, match="dataset.revision is 'main', but .* written by save_to_disk.* Leave it out"
    ):
        load_pair(DatasetSettings(str(tmp_path / "whole"), revision="main"))


def test_data_dir_and_data_files(place):
    path = str(place)
    train, test = load_pair(DatasetSettings(path, data_dir="data"))
    assert (len(train), len(test)) == (32, 20)
    files = {"train": "single/train.parquet", "test": "data/test.parquet"}
    train, test = load_pair(DatasetSettings(path, data_files=files))
    assert (len(train), len(test)) == (40, 20)
    data = load_data(DatasetSettings(path, data_files="single/*.parquet", test_fraction=0.5))
    assert (len(data["train"]), len(data["test"])) == (20, 20)


def test_settings_of_the_data_are_handed_on(configuration, capsys):
    dataset = {"path": "owner/name", "revision": 1}
    assert main(["train", configuration(dataset)]) == 2
    assert "dataset.revision is 1, but must be text or null" in capsys.readouterr().err
