"""What data is called, what tells two data sets apart, and which test images of domains count."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

from peft_cl import LinearProbeConfig, RunResults, class_incremental, domain_incremental, results_table
from peft_cl.cli import main
from peft_cl.metrics.table import group_of
from peft_cl.trainer.provenance import dataset_name


def photos(place, seed: int, names=("a", "b")):
    rng = np.random.default_rng(seed)
    for split, count in (("train", 4), ("test", 2)):
        for name in names:
            (place / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                PILImage.fromarray(pixels).save(place / split / name / f"{number}.png")
    return place


def scenario(place, **words):
    return class_incremental(load_dataset("imagefolder", data_dir=str(place)), 2, **words)


def test_a_folder_has_its_own_name(tmp_path):
    clothes, animals = (photos(tmp_path / name, seed) for seed, name in enumerate(("clothes", "animals")))
    assert [dataset_name(scenario(place)) for place in (clothes, animals)] == ["clothes", "animals"]
    assert dataset_name(scenario(photos(tmp_path / "letters", 3, ("letters", "b")))) == "letters"
    files = {split: f"{clothes}/{split}/**" for split in ("train", "test")}
    assert dataset_name(class_incremental(load_dataset("imagefolder", data_files=files), 1)) == "clothes"


def test_content_is_the_same_in_any_order_and_place(tmp_path):
    place = photos(tmp_path / "one", 0)
    shutil.copytree(place, tmp_path / "two")
    content = scenario(place).content
    assert scenario(tmp_path / "two").content == content == scenario(place).content
    assert scenario(place, seed=1).content == scenario(place, seed=0).content == content
    data = load_dataset("imagefolder", data_dir=str(place))
    assert class_incremental(data.shuffle(seed=1), 2).content == content
    assert class_incremental(data, classes_per_task=[1], num_tasks=None, seed=0).content == content
    other = photos(tmp_path / "three", 1)
    assert scenario(other).content != content
    longer = scenario(place).with_task(
        load_dataset("imagefolder", data_dir=str(photos(tmp_path / "more", 2, ("c", "d"))))
    )
    assert longer.content not in (content, None)


def test_two_folders_of_one_name_are_no_table(tmp_path, place):
    def run(folder, *words):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = ["--dataset", str(folder), "--output_dir", str(out), "--training.max_steps", "1", *words]
        assert main(["train", str(place / "config.yaml"), *words]) == 0
        return RunResults.load(out)

    first, second = (photos(tmp_path / name / "photos", seed) for seed, name in enumerate("xy"))
    runs = [run(first), run(first, "--training.seed", "1"), run(second, "--training.seed", "2")]
    assert {run.dataset for run in runs} == {"photos"}
    assert "n = 2" in results_table([dataclasses.replace(r, hyperparameters={}) for r in runs[:2]])
    with pytest.raises(ValueError, match="called 'photos' in all of them, but has other images.*one table for each"):
        results_table(runs)
    assert group_of(runs[0]) == group_of(runs[1]) != group_of(runs[2])
    earlier = dataclasses.replace(runs[2], scenario={**runs[2].scenario, "content": None})
    assert results_table([runs[0], earlier])


def test_a_folder_may_be_moved_before_a_run_is_resumed(tmp_path, make_trainer):
    def trainer(place):
        return make_trainer(LinearProbeConfig(), scenario=scenario(place), num_train_epochs=1)

    place = photos(tmp_path / "before", 0)
    first = trainer(place)
    first.train_task(first.scenario[0])
    second = trainer(place.rename(tmp_path / "after"))
    second.train(resume_from_checkpoint=True)
    assert second.finished_tasks == 2 and second.results.dataset == "after"


# ----------------------------------------------------------------------------------------------- domains


def domains(train: str, test: str) -> tuple[Dataset, Dataset]:
    """Splits of "domain class" pairs, such as "p1 s2": a noisy image each."""
    rng = np.random.default_rng(0)
    made = []
    for pairs in (train.split(), test.split()):
        images = [PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in pairs]
        columns = {"image": images, "domain": [pair[0] for pair in pairs], "label": [pair[1] for pair in pairs]}
        made.append(Dataset.from_dict(columns).cast_column("image", Image()))
    return tuple(each.class_encode_column("label").class_encode_column("domain") for each in made)


def test_test_images_of_what_a_domain_does_not_train_are_left_out():
    data = domains("pa pb sa ca cb", "pa pb sa sb sb ca cb")
    with pytest.warns(
        UserWarning, match=r"domain 's' has no training examples of \['b'\], and its 2 test .* left out"
    ):
        made = domain_incremental(data)
    assert {task.name: (task.classes, len(task.test)) for task in made} == {
        "c": (("a", "b"), 2),
        "p": (("a", "b"), 2),
        "s": (("a",), 1),
    }


def test_a_domain_that_is_tested_on_nothing_it_trains_is_refused():
    with pytest.raises(
        ValueError, match=r"The domain 's' has test examples of \['b'\], but no training .* domain_order="
    ):
        domain_incremental(domains("pa pb sa", "pa sb"))


def test_on_the_command_line_they_are_left_out_too(place, tmp_path):
    train, test = domains("pa pb sa", "pa pb sa sb")
    for name, data in (("train", train), ("test", test)):
        data.to_parquet(tmp_path / f"{name}.parquet")
    scenario = "{kind: domain-incremental}"
    words = ["--dataset", str(tmp_path), "--scenario", scenario, "--training.max_steps", "1", "--preset", "null"]
    with pytest.warns(UserWarning, match="domain 's' has no training examples"):
        assert main(["train", str(place / "config.yaml"), *words, "--output_dir", str(tmp_path / "out")]) == 0
    assert RunResults.load(tmp_path / "out").test_sizes == [2, 1]


# ----------------------------------------------------------------------------------------------- remedies


def test_a_list_of_labels_names_a_remedy_that_works():
    train, test = domains("pa pb", "pa pb")
    names = {"train": train, "test": test}
    lists = {split: data.map(lambda row: {"label": [row["label"]]}) for split, data in names.items()}
    lists = {split: data.cast_column("label", [train.features["label"]]) for split, data in lists.items()}
    with pytest.raises(
        ValueError,
        match=r"An image has one class: choose it by map\(lambda row: \{'label': row\['label'\]\[0\]\}\), or name",
    ):
        class_incremental(lists, 2)
    # what the message says
    one = {split: data.map(lambda row: {"label": row["label"][0]}) for split, data in lists.items()}
    assert [len(task.train) for task in class_incremental(one, 2)] == [1, 1]


@pytest.mark.parametrize("values", [[0.0, 1.0], [False, True]])
def test_numbers_that_are_no_labels_name_a_remedy_that_works(values):
    made = {}
    for split, data in zip(("train", "test"), domains("pa pb", "pa pb"), strict=True):
        made[split] = data.remove_columns("label").add_column("label", values)
    with pytest.raises(ValueError, match=r"Convert it by class_encode_column\('label'\), or name"):
        class_incremental(made, 2)
    assert len(class_incremental({split: data.class_encode_column("label") for split, data in made.items()}, 2)) == 2


def test_another_kind_of_column_names_a_remedy():
    with pytest.raises(ValueError, match=r"Make a column of one label for each image by map\(\), or name another"):
        class_incremental(domains("pa pb", "pa pb"), 2, "image")


def test_images_without_class_folders(tmp_path):
    place = photos(tmp_path / "photos", 0, (".",))
    data = load_dataset("imagefolder", data_dir=str(place))
    with pytest.raises(ValueError, match="4 of 4 examples of the train split have no label .*FOLDER/train/cat"):
        class_incremental(data, 1)
    without = data.remove_columns("label")
    with pytest.raises(ValueError, match="its columns are .*so nothing says what the images show.*FOLDER/train/cat"):
        class_incremental(without, 1)
    data = load_dataset("imagefolder", data_dir=str(place), drop_labels=False)
    with pytest.raises(
        ValueError, match=r"\['train'\] alone, the test split of \['test'\]: these are names of splits"
    ):
        class_incremental(data, 1)
