"""Queries that are kept in files: never computed twice, never stale."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from trainer_cases import CONFIGS, images
from transformers import ViTImageProcessorPil

from peft_cl import ContinualTrainer, ContinualTrainingArguments, RandomResizedCropFlip, class_incremental
from peft_cl.strategies import ExperienceReplay
from peft_cl.trainer.tensor_files import images_outside
from peft_cl.tuners.base.model import PromptPoolModel


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Sizes of the batches whose queries the cache has computed."""
    sizes: list[int] = []
    query = PromptPoolModel.query
    monkeypatch.setattr(PromptPoolModel, "query", lambda self, x: sizes.append(len(x)) or query(self, x))
    return sizes


@pytest.fixture
def kept(tmp_path) -> Path:
    return tmp_path / "queries"


@pytest.fixture
def run(make_trainer, kept):
    """`run(...)` trains for an epoch with the folder of queries, and returns the trainer."""

    def call(name="coda", **more) -> ContinualTrainer:
        trainer = make_trainer(CONFIGS[name](), query_cache_dir=str(kept), num_train_epochs=1, **more)
        trainer.train()
        return trainer

    return call


def on_disk(part: Dataset, folder: Path, suffix: str) -> Dataset:
    """The data set with its images in files, which it names; files that exist stay as they are."""
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{row}{suffix}.png") for row in range(len(part))]
    for path, example in zip(paths, part, strict=True):
        if not Path(path).exists():
            example["image"].save(path)
    return Dataset.from_dict({"image": paths, "label": part["label"]}, features=part.features)


def weights(trainer: ContinualTrainer) -> torch.Tensor:
    trained = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    return torch.cat([parameter.detach().flatten() for parameter in trained])


def test_a_second_run_computes_no_query(run, passes, kept):
    first = run()
    assert sum(passes) == 96 + 48  # every training and test image once
    assert len(list(kept.iterdir())) == 6  # of 3 tasks
    passes.clear()
    second = run(folder="again")
    assert passes == []
    assert torch.equal(weights(first), weights(second))
    np.testing.assert_array_equal(first.accuracy_matrix, second.accuracy_matrix)


def test_methods_with_the_same_backbone_share_them(run, passes):
    run("coda")
    passes.clear()
    for name in ("l2p", "dualprompt", "linear-probe"):
        run(name, folder=name)
    assert passes == []


def test_whatever_has_changed_is_computed_anew(run, passes, kept, tiny_vit, data, tmp_path):
    """A weight of the backbone, its attention, its number format, the image processor, an image."""
    run()

    def again(model=None, data=data, size=None):
        passes.clear()
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, **(size or {}))
        arguments = ContinualTrainingArguments(
            str(tmp_path / "again"), use_cpu=True, disable_tqdm=True, max_steps=1, query_cache_dir=str(kept)
        )
        model = get_peft_model(tiny_vit() if model is None else model, CONFIGS["coda"]())
        ContinualTrainer(model, arguments, class_incremental(data, 3), processing_class=processor).train()
        return sum(passes)

    assert again() == 0
    changed = tiny_vit()
    with torch.no_grad():
        changed.vit.layers[1].mlp.fc2.bias[0] += 1e-3
    assert again(changed) == 144
    assert again(tiny_vit(attn_implementation="eager")) == 144
    assert again(tiny_vit().to(torch.bfloat16)) == 144
    assert again(size={"image_mean": [0.4, 0.5, 0.5]}) == 144
    assert again(data={**data, "test": images(8, 7)}) == 48
    assert again() == 0


@pytest.mark.parametrize("harm", [lambda content: content[:-9], lambda content: content[:-9] + b"\x00" * 9])
def test_a_damaged_file_is_made_anew(harm, run, passes, kept):
    trainer = run()
    whole = {path: path.read_bytes() for path in kept.iterdir()}
    harmed = sorted(whole)[0]
    harmed.write_bytes(harm(whole[harmed]))
    passes.clear()
    with pytest.warns(UserWarning, match=f"queries in .*{harmed.name}.* made anew"):
        again = run(folder="again")
    assert sum(passes) in (16, 32)  # of one task
    assert {path: path.read_bytes() for path in kept.iterdir()} == whole
    assert torch.equal(weights(trainer), weights(again))


def test_files_are_for_whom_the_umask_says(run, kept, umask=0o022):
    before = os.umask(umask)
    try:
        run()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o644}


def test_a_folder_that_cannot_be_written_stops_nothing(run, kept):
    kept.write_text("a file")
    with pytest.warns(UserWarning, match="queries cannot be kept in .*queries.*the run goes on"):
        assert run().finished_tasks == 3


def write_in_place(layer: torch.nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(1.1)


def write_data(layer: torch.nn.Linear) -> None:
    layer.weight.data.mul_(1.1)


def put_another_in_its_place(layer: torch.nn.Linear) -> None:
    layer.load_state_dict({name: 1.1 * value for name, value in layer.state_dict().items()}, assign=True)
    layer.requires_grad_(False)


@pytest.mark.parametrize("write", [write_in_place, write_data, put_another_in_its_place])
@pytest.mark.parametrize("files", [False, True], ids=["memory", "files"])
def test_a_backbone_that_is_changed_has_no_queries(write, files, make_trainer, passes, kept):
    """In memory too: who changes the backbone between two tasks gets its new features, under their own name."""
    folder = {"query_cache_dir": str(kept)} if files else {}
    trainer = make_trainer(CONFIGS["coda"](), num_train_epochs=1, **folder)
    trainer.train_task(trainer.scenario[0])
    assert sum(passes) == 32 + 16
    write(trainer.model.base_model.encoder.base_layer.layers[0].mlp.fc1)
    passes.clear()
    trainer.train_task(trainer.scenario[1])
    assert sum(passes) == 32 + 2 * 16  # the first task's test images again
    passes.clear()
    make_trainer(CONFIGS["coda"](), folder="unchanged", num_train_epochs=1, **folder).train()
    assert sum(passes) == (2 * (32 + 16) if files else 144)  # of the first backbone only the first task's are kept


def test_hooks_on_the_backbone_leave_no_files(run, passes, kept, tiny_vit):
    """What they do to the features, no digest of weights shows."""
    model = get_peft_model(tiny_vit(), CONFIGS["coda"]())
    model.base_model.encoder.base_layer.layers[1].register_forward_hook(lambda module, inputs, output: output)
    run(model=model)
    assert sum(passes) == 144 and not kept.exists()


def other_activation(base: torch.nn.Module) -> None:
    base.layers[0].mlp.activation_fn = torch.nn.ReLU()


def other_class(base: torch.nn.Module) -> None:
    kind = type(base.layers[1])
    base.layers[1].__class__ = type(
        "Halving", (kind,), {"forward": lambda self, *a, **k: kind.forward(self, *a, **k) / 2}
    )


def other_epsilon(base: torch.nn.Module) -> None:
    base.layernorm.eps = 0.1


@pytest.mark.parametrize("change", [other_activation, other_class, other_epsilon])
def test_a_backbone_of_other_modules_has_no_queries(change, run, passes, tiny_vit):
    """The weights are the same, in files and in memory."""
    trainer = run()
    assert sum(passes) == 144
    passes.clear()
    trainer.evaluate()
    assert not passes
    change(trainer.tuner.encoder.base_layer)
    trainer.evaluate()
    assert sum(passes) == 48
    passes.clear()
    model = get_peft_model(tiny_vit(), CONFIGS["coda"]())
    change(model.base_model.encoder.base_layer)
    run(model=model, folder="other")
    assert sum(passes) == 144 - 48  # the test images are kept already


def test_a_hook_that_comes_later_is_seen(make_trainer, passes):
    trainer = make_trainer(CONFIGS["coda"](), num_tasks=1, num_train_epochs=1)
    trainer.train()
    passes.clear()
    trainer.tuner.encoder.base_layer.layers[1].register_forward_hook(lambda module, inputs, output: output * 2)
    trainer.evaluate()
    assert sum(passes) == 48


class Inverting(ViTImageProcessorPil):
    """Its settings say nothing of its code."""

    factor = 1

    def __call__(self, *args, **kwargs):
        batch = super().__call__(*args, **kwargs)
        batch["pixel_values"] = batch["pixel_values"] * self.factor
        return batch


def test_a_processor_of_other_code_has_no_queries(run, passes, processor, monkeypatch):
    own = Inverting.from_dict(processor.to_dict())
    run(processing_class=own)
    passes.clear()
    monkeypatch.setattr(Inverting, "factor", -1)
    run(processing_class=own, folder="other")
    assert sum(passes) == 144


@pytest.mark.parametrize("bf16", [False, True])
def test_kept_queries_are_those_of_the_steps(bf16, make_trainer):
    """In the precision of the steps: what a step would compute from the images is what it is given."""
    trainer = make_trainer(CONFIGS["l2p"](), num_tasks=1, max_steps=12, cache_queries=True, bf16=bf16)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    images, computed = batch["pixel_values"], []
    pool = trainer.tuner.pool
    pool.register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0].float()))
    trainer.model(images)
    torch.testing.assert_close(batch["query"], computed[0], atol=1e-5, rtol=0)
    assert torch.equal(computed[0], trainer.tuner.query(images)) == (not bf16)


def test_images_replaced_under_their_names_are_computed_anew(run, passes, tmp_path, data):
    """A data set made of paths has the same fingerprint whatever the files hold."""

    def named(suffix: str):
        return {split: on_disk(part, tmp_path / split, suffix) for split, part in data.items()}

    def again(folder: str, part) -> int:
        passes.clear()
        run(folder=folder, scenario=class_incremental(part, 3))
        return sum(passes)

    assert again("first", named("a")) == 144 and again("second", named("a")) == 0
    for path in (tmp_path / "test").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert again("third", named("a")) == 48
    assert images_outside(data["test"], "image") == images_outside(data["train"], "image")  # they hold their images
    part = named("a")["test"]
    next((tmp_path / "test").iterdir()).unlink()
    assert images_outside(part, "image") is None


def test_a_data_set_with_a_transform_has_no_queries(run, passes, data):
    """It may give another image each time."""
    changed = data["train"].with_transform(
        lambda rows: {**rows, "image": [image.rotate(90) for image in rows["image"]]}
    )
    trainer = run(scenario=class_incremental({"train": changed, "test": data["test"]}, 3))
    assert sum(passes) == 48 and "query" not in trainer.train_dataset.tensors


def test_a_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="query_cache_dir is 'q', but cache_queries is False"):
        ContinualTrainingArguments(str(tmp_path), cache_queries=False, query_cache_dir="q")


def test_workers_fetch_kept_queries_and_images(run, passes, tmp_path):
    """Processes that fetch examples read what this one keeps, and compute nothing."""
    plain = run(folder="plain")
    passes.clear()
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    fetched = run(folder="fetched", image_cache_dir=str(tmp_path / "images"), **workers)
    assert passes == []
    assert torch.equal(weights(plain), weights(fetched))
    np.testing.assert_array_equal(plain.accuracy_matrix, fetched.accuracy_matrix)


# ----------------------------------------------------------------------------------------------- augmentations


@pytest.mark.parametrize("name", ["coda", "l2p", "linear-probe"])
def test_augmentations_that_come_again_have_their_queries_kept(name, make_trainer, passes):
    """Two draws of each image in four epochs: two queries each, and the same training as with none kept."""
    common = {"augmentation": RandomResizedCropFlip(size=32), "num_train_epochs": 4, "augmentation_draws": 2}
    kept = make_trainer(CONFIGS[name](), **common)
    kept.train()
    assert sum(passes) == 2 * 96 + 48
    passes.clear()
    without = make_trainer(CONFIGS[name](), folder="without", cache_queries=False, **common)
    without.train()
    assert passes == []
    torch.testing.assert_close(weights(kept), weights(without), rtol=1e-3, atol=1e-4)
    examples = kept.examples([kept.scenario[0]], "train")
    seeds = []
    for epoch in range(4):
        examples.begin_epoch(epoch)
        seeds.append([examples[row]["draw"] for row in range(3)])
    assert seeds[0] == seeds[2] != seeds[1] == seeds[3]
    assert kept.results.hyperparameters["augmentation_draws"] == 2


def test_replayed_images_bring_their_queries_too(make_trainer):
    config = CONFIGS["coda"]()
    config.train_mask = False
    trainer = make_trainer(
        config,
        strategy=ExperienceReplay(12),
        augmentation=RandomResizedCropFlip(size=32, scale=(0.8, 1.0)),
        augmentation_draws=1,
    )
    trainer.train()
    assert trainer.metrics["average_accuracy"] > 0.5


def test_draws_without_an_augmentation_are_refused(make_trainer):
    with pytest.raises(ValueError, match="augmentation_draws is 3, but no augmentation is given"):
        make_trainer(CONFIGS["coda"](), augmentation_draws=3)
