"""Images kept decoded and scaled: the same pixels, and none decoded twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Image as ImageFeature
from PIL import Image
from trainer_cases import CONFIGS
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from peft_cl import ContinualTrainer, RandomResizedCropFlip, class_incremental
from peft_cl.scenarios import ImageTransform
from peft_cl.strategies import EWC, ExperienceReplay, JointTraining, NearestClassMean


@pytest.fixture
def decoded(monkeypatch) -> list:
    """An entry for each image that is decoded."""
    seen: list = []
    decode = ImageFeature.decode_example
    monkeypatch.setattr(
        ImageFeature, "decode_example", lambda self, *args, **more: seen.append(1) or decode(self, *args, **more)
    )
    return seen


def photos(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def outcome(trainer: ContinualTrainer) -> torch.Tensor:
    trained = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    return torch.cat([parameter.detach().flatten() for parameter in trained])


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False),
        BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    ],
    ids=["scaled", "not normalised", "scaled and cropped"],
)
def test_bytes_give_the_processors_pixels(processor):
    transform, images = ImageTransform(processor), photos((50, 40), (32, 32), (200, 300))
    assert transform.has_bytes
    assert transform.to_bytes(images).dtype == torch.uint8
    assert torch.equal(transform.from_bytes(transform.to_bytes(images)), transform(images))


@pytest.mark.parametrize("name", ["coda", "linear-probe"])
@pytest.mark.parametrize("more", [{}, {"cache_queries": False}, {"dataloader_num_workers": 1}], ids=str)
def test_training_is_the_same_to_the_bit(name, more, make_trainer, tmp_path):
    outcomes, matrices = [], []
    for folder in (None, tmp_path / "images"):
        words = {} if folder is None else {"image_cache_dir": str(folder)}
        trainer = make_trainer(CONFIGS[name](), folder=f"run {folder is None}", num_train_epochs=1, **more, **words)
        trainer.train()
        outcomes.append(outcome(trainer))
        matrices.append(trainer.accuracy_matrix)
    assert torch.equal(*outcomes)
    np.testing.assert_array_equal(*matrices)
    assert len(list((tmp_path / "images").iterdir())) == 6


@pytest.mark.parametrize("strategy", [JointTraining, lambda: ExperienceReplay(8)], ids=["joint", "er"])
def test_several_data_sets_in_one_batch(strategy, make_trainer, tmp_path):
    outcomes = []
    for folder in (None, str(tmp_path / "images")):
        config = CONFIGS["coda"]()
        config.train_mask = False
        trainer = make_trainer(
            config, folder=f"run {folder is None}", num_train_epochs=1, strategy=strategy(), image_cache_dir=folder
        )
        trainer.train()
        outcomes.append(outcome(trainer))
    assert torch.equal(*outcomes)


def test_every_image_is_decoded_once_for_all_runs(make_trainer, tmp_path, decoded):
    for run in range(2):
        make_trainer(CONFIGS["coda"](), folder=str(run), image_cache_dir=str(tmp_path / "images")).train()
    assert len(decoded) == 96 + 48


def test_images_that_are_augmented_one_by_one_are_decoded(make_trainer, tmp_path, decoded):
    trainer = make_trainer(
        CONFIGS["coda"](), augmentation=RandomResizedCropFlip(), image_cache_dir=str(tmp_path / "images")
    )
    trainer.train()
    assert len(decoded) == 1 + 2 * 96 + 48  # for a trial, each epoch, and the test images once
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_batches_are_augmented_from_kept_images(make_trainer, tmp_path, decoded):
    trainer = make_trainer(
        CONFIGS["coda"](), batch_augmentation=lambda pixels: pixels.flip(-1), image_cache_dir=str(tmp_path / "images")
    )
    trainer.train()
    assert len(decoded) == 96 + 48 and trainer.metrics["average_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("method", "strategy", "held"),
    [
        ("coda", ExperienceReplay(8), 0),
        ("coda", EWC(1.0, 8), 0),
        ("linear-probe", NearestClassMean(), 0),
        ("coda", JointTraining(), 3),
    ],
    ids=["er", "ewc", "ncm", "joint"],
)
def test_no_more_images_are_held_and_kept_than_there_are(method, strategy, held, make_trainer, tmp_path):
    """Beside the test images only those of earlier tasks that are trained on again; a memory has no files."""
    config = CONFIGS[method]()
    config.train_mask = False
    folder = tmp_path / "images"
    trainer = make_trainer(config, num_train_epochs=1, strategy=strategy, image_cache_dir=str(folder))
    trainer.train()
    tests = {id(task.test) for task in trainer.scenario}
    assert len(set(trainer.images._images) - tests) <= held
    assert len(list(folder.iterdir())) == 6


def test_images_in_files_are_mapped_from_the_first_run_on(make_trainer, tmp_path):
    trainer = make_trainer(CONFIGS["coda"](), image_cache_dir=str(tmp_path / "images"))
    made = []
    decode = trainer.images._decoded
    trainer.images._decoded = lambda data: made.append(decode(data)) or made[-1]
    images = trainer.images.of(trainer.scenario[0].train)
    assert torch.equal(images, made[0]) and images.data_ptr() != made[0].data_ptr()


def test_a_data_set_with_a_transform_is_refused(make_trainer, tmp_path, data):
    changed = data["train"].with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match="image_cache_dir is .*, but the train images of task 'task_0'.*with_transf"):
        make_trainer(
            CONFIGS["coda"](),
            scenario=class_incremental({"train": changed, "test": data["test"]}, 3),
            image_cache_dir=str(tmp_path / "images"),
        )


def test_a_processor_of_another_kind_is_refused(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(ViTImageProcessorPil, "normalize", lambda self, image, *args, **more: image * image.mean())
    with pytest.raises(ValueError, match="image_cache_dir is .* Leave image_cache_dir out"):
        make_trainer(CONFIGS["coda"](), image_cache_dir=str(tmp_path / "images"))
