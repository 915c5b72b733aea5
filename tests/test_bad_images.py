"""Images that cannot be read: named, looked for before training, passed over, and resumed after they are mended."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from trainer_cases import CONFIGS

from peft_cl import LinearProbeConfig, RunResults, class_incremental
from peft_cl.cli import main
from peft_cl.trainer.bad_images import BadImageError


NAMES = ["red", "green", "blue"]
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def break_in_the_middle(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


#: A fault -> what it does to a file, and the words for it.
FAULTS = {
    "truncated": (break_in_the_middle, "truncated|broken|incomplete|no image"),
    "header alone": (truncate, "truncated|broken|no image"),
    "0 bytes": (lambda path: path.write_bytes(b""), "it has 0 bytes"),
    "text": (lambda path: path.write_text("no image at all"), "its bytes are no image that Pillow knows"),
    "missing": (lambda path: path.unlink(), "there is no such file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "there is no such file"),
}


@pytest.fixture
def photos(tmp_path):
    """A folder with a folder for each split and class, six and four noisy images in each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for name, colour in zip(NAMES, COLOURS, strict=True):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + rng.normal(0, 30, (32, 32, 3))
                PILImage.fromarray(pixels.clip(0, 255).astype("uint8")).save(place / f"{number}.png")
    return tmp_path / "photos"


def in_memory(photos, **bad) -> dict[str, Dataset]:
    """The images by their names; `train={3: None}`: others in their places."""
    made = {}
    for split in ("train", "test"):
        files = [
            (str(path), label)
            for label, name in enumerate(NAMES)
            for path in sorted((photos / split / name).iterdir())
        ]
        images = [bad.get(split, {}).get(row, path) for row, (path, _) in enumerate(files)]
        features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
        made[split] = Dataset.from_dict({"image": images, "label": [label for _, label in files]}, features=features)
    return made


@pytest.fixture
def trainer(make_trainer, photos):
    def make(data=None, **words):
        return make_trainer(
            words.pop("config", None) or LinearProbeConfig(),
            scenario=class_incremental(data or in_memory(photos), 3),
            **{"num_train_epochs": 1, **words},
        )

    return make


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("split", "row"), [("train", 9), ("test", 5)])
def test_a_bad_image_is_named(fault, split, row, trainer, photos):
    made = trainer()
    path = photos / split / "green" / f"{row - (6 if split == 'train' else 4)}.png"
    FAULTS[fault][0](path)
    message = rf"task 'task_1', {split} split, row {path.stem} \({path}\): .*({FAULTS[fault][1]})"
    with pytest.raises(BadImageError, match=message):
        made.train()
    assert made.finished_tasks == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_a_bad_image_of_other_data_is_named(labelled, trainer, photos):
    """Of data that is given to `predict` and is no task's own."""
    made = trainer()
    made.train()
    other = in_memory(photos)["test"]
    path = photos / "test" / "green" / "1.png"
    truncate(path)
    data = other if labelled else other.remove_columns("label")
    with pytest.raises(BadImageError, match=rf"given split, row 5 \({path}\): .*truncated.*Mend the file or remove"):
        made.predict(data)
    kept = [row for row in range(len(other)) if row != 5]
    assert len(made.predict(data.select(kept)).names) == len(kept)


@pytest.mark.parametrize(
    "words", [{"dataloader_num_workers": 1}, {"image_cache_dir": "cache"}, {"config": CONFIGS["l2p"]()}]
)
def test_a_bad_image_is_named_however_it_is_read(words, trainer, photos, tmp_path):
    if "image_cache_dir" in words:
        words = {"image_cache_dir": str(tmp_path / "cache")}
    made = trainer(**words)
    (photos / "train" / "green" / "3.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"task 'task_1', train split, row 3 \(.*3.png\): it has 0 bytes"):
        made.train()


def test_none_is_no_image(trainer, photos):
    with pytest.raises(BadImageError, match=r"task 'task_1', train split, row 3: there is no image \(None\)"):
        trainer(in_memory(photos, train={9: None})).train()


def test_bytes_inside_the_data_set_are_named_by_their_row(trainer, photos):
    bad = {"bytes": b"", "path": "x.png"}
    with pytest.raises(BadImageError, match=r"test split, row 2 \(x.png\): it has 0 bytes"):
        trainer(in_memory(photos, test={2: bad})).train()


def test_a_bomb_is_named(trainer, monkeypatch):
    made = trainer()
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(
        BadImageError, match=r"row 0 \(.*\): Image size \(1024 pixels\) exceeds limit.*MAX_IMAGE_PIXELS"
    ):
        made.train()


def test_values_that_no_pixel_can_be(trainer, photos):
    image = photos / "negative.tiff"
    PILImage.fromarray(np.full((32, 32), -1, dtype=np.float32)).save(image)
    with pytest.raises(BadImageError, match=r"row 3 \(.*negative.tiff\): An image of mode F has values from -1"):
        trainer(in_memory(photos, train={9: str(image)})).train()


def test_all_are_checked_before_training(trainer, photos):
    for split, name in (("train", "blue/1.png"), ("test", "red/0.png"), ("train", "red/2.png")):
        (photos / split / name).write_bytes(b"")
    with pytest.raises(
        BadImageError,
        match=r"3 images cannot be read. task 'task_0', train .*red/2.*'task_0', test .*red/0.*blue/1.*Mend",
    ):
        trainer(bad_images="check")
    with pytest.raises(ValueError, match="bad_images is 'skip', but must be one of stop, check, pass_over"):
        trainer(bad_images="skip")


def test_bad_ones_are_passed_over_counted_named_and_recorded(trainer, photos, tmp_path, caplog):
    data = in_memory(photos, train={0: None}, test={11: None})
    (photos / "train" / "green" / "3.png").write_bytes(b"")
    made = trainer(data, bad_images="pass_over")
    assert [len(task.train) for task in made.scenario] == [5, 5, 6]
    assert [len(task.test) for task in made.scenario] == [4, 4, 3]
    made.train()
    record = RunResults.load(tmp_path / "run")
    passed = record.hyperparameters["passed_over"]
    assert passed["count"] == 3 and record.scenario["train_sizes"] == [5, 5, 6] and record.test_sizes == [4, 4, 3]
    assert [(each["task"], each["split"], each["row"]) for each in passed["images"]] == [
        ("task_0", "train", 0),
        ("task_1", "train", 3),
        ("task_2", "test", 3),
    ]
    assert passed["images"][1]["file"].endswith("3.png") and "0 bytes" in passed["images"][1]["reason"]
    assert (
        "passed_over"
        not in trainer(
            in_memory(photos, train={9: str(photos / "train/red/0.png")}), folder="b"
        ).results.hyperparameters
    )


def test_a_task_without_any_image_is_refused(trainer, photos):
    for path in (photos / "train" / "green").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadImageError, match="None of the 6 train images of task 'task_1' can be read"):
        trainer(bad_images="pass_over")


@pytest.mark.parametrize("how", ["mended", "dropped", "passed over"])
@pytest.mark.parametrize(("split", "row"), [("train", 9), ("test", 5), ("train", 13)])
def test_finished_tasks_are_resumed(how, split, row, trainer, photos, tmp_path):
    """With a bad image in a later task, which changes labels' counts and the digest of that task's images."""
    path = in_memory(photos)[split].cast_column("image", Image(decode=False))[row]["image"]["path"]
    whole = tmp_path / "whole.png"
    shutil.copy(path, whole)
    shutil.os.truncate(path, 0)
    first = trainer(save_strategy="steps", save_steps=1)
    with pytest.raises(BadImageError):
        first.train()
    assert first.finished_tasks >= 1
    data, words = in_memory(photos), {}
    if how == "mended":
        PILImage.open(whole).rotate(90).save(path)
    elif how == "dropped":
        data[split] = data[split].select([n for n in range(len(data[split])) if n != row])
    else:
        words = {"bad_images": "pass_over"}
    second = trainer(data, save_strategy="steps", save_steps=1, **words)
    second.train(resume_from_checkpoint=True)
    assert second.finished_tasks == 3
    assert second.accuracy_matrix[0, 0] == first.accuracy_matrix[0, 0]


def test_what_was_learnt_must_be_the_same(trainer, photos):
    (photos / "train" / "blue" / "0.png").write_bytes(b"")
    with pytest.raises(BadImageError):
        trainer().train()
    data = in_memory(photos, train={12: str(photos / "train" / "blue" / "1.png")})
    data["train"] = data["train"].select(range(1, 18))  # an image of the first task
    with pytest.raises(ValueError, match="cannot be resumed with other settings: .*task_0"):
        trainer(data).train(resume_from_checkpoint=True)


@pytest.fixture
def configuration(place, photos, tmp_path):
    config = yaml.safe_load((place / "config.yaml").read_text())
    config |= {"dataset": str(photos), "output_dir": str(tmp_path / "out"), "scenario": {"num_tasks": 3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


def test_on_the_command_line(configuration, photos, tmp_path, capsys):
    (photos / "train" / "green" / "0.png").write_bytes(b"")
    words = ["train", configuration, "--training.num_train_epochs", "1"]
    assert main([*words, "--training.bad_images", "check"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("peft-cl: ") and "green/0.png): it has 0 bytes" in line
    assert main([*words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("peft-cl: ") and "green/0.png): it has 0 bytes" in line
    assert main([*words, "--resume", "--training.bad_images", "pass_over"]) == 0
    assert RunResults.load(tmp_path / "out").hyperparameters["passed_over"]["count"] == 1
    (photos / "test" / "green" / "0.png").write_bytes(b"")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--dataset", str(photos)]) == 2
    assert "green/0.png): it has 0 bytes" in capsys.readouterr().err
