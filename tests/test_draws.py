"""Augmentation draws from each example's own seed: whoever fetches it, and whatever was fetched before."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_cases import CONFIGS

from peft_cl.trainer.checks import TRIALS


class Note:
    """An augmentation that leaves the image alone and writes its draws down."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, image):
        mean = np.asarray(image).mean()
        draws = (random.random(), np.random.random(), torch.rand(()).item())
        with self.path.open("a") as file:
            file.write(f"{mean:.4f} {draws}\n")
        return image


@pytest.fixture
def notes(make_trainer, tmp_path):
    def get(folder: str, **training) -> list[str]:
        path = tmp_path / f"{folder}.txt"
        make_trainer(CONFIGS["linear-probe"](), folder=folder, augmentation=Note(path), **training).train()
        return path.read_text().splitlines()

    return get


def test_every_example_draws_anew_in_every_epoch_and_task(notes):
    lines = notes("run")[2 * TRIALS :]  # before them it is tried
    draws = [line.partition(" ")[2] for line in lines]
    assert len(lines) == 2 * 96 and len(set(draws)) == len(draws)


def test_workers_draw_what_the_main_process_draws(notes):
    alone = notes("alone")
    for settings in ({}, {"dataloader_persistent_workers": True}):
        assert sorted(notes(f"workers {settings}", dataloader_num_workers=2, **settings)) == sorted(alone)


def test_the_generators_are_left_as_they_were(make_trainer, tmp_path):
    trainer = make_trainer(CONFIGS["linear-probe"](), augmentation=Note(tmp_path / "notes.txt"))
    trainer.task = trainer.scenario[0]
    trainer.tuner.begin_task(trainer.task.classes)
    examples = trainer.examples([trainer.task], "train")
    collate = trainer._collators[True]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    collate(examples.__getitems__([0, 1]))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
