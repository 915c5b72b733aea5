"""What the tests of the command share: small data, a model, a configuration, and a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peft_cl import ContinualTrainer
from peft_cl.cli import main


EXAMPLES = Path(__file__).parents[1] / "examples"
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}


def pictures(per_class: int, seed: int) -> Dataset:
    """Four classes of 16x16 images, each a colour with noise."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(COLOURS)), per_class)
    pixels = np.array(list(COLOURS.values()))[labels][:, None, None] + rng.normal(0, 60, (len(labels), 16, 16, 3))
    return Dataset.from_dict(
        {"image": [PILImage.fromarray(each.clip(0, 255).astype("uint8")) for each in pixels], "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(names=list(COLOURS))}),
    )


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with `data` (parquet), `single` (parquet, one split), `model` and `config.yaml`."""
    folder = tmp_path_factory.mktemp("cli")
    for path, split, rows in (("data", "train", (8, 0)), ("data", "test", (5, 1)), ("single", "train", (10, 2))):
        (folder / path).mkdir(exist_ok=True)
        pictures(*rows).to_parquet(folder / path / f"{split}.parquet")
    size = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_labels": 3}
    width = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(**size, **width)).save_pretrained(folder / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    config = {
        "model": {"name": str(folder / "model")},
        "method": "coda",
        "preset": "official",
        "adapter": {"components_per_task": 2, "prompt_length": 4, "layers": [0, 1]},
        "dataset": {"path": str(folder / "data")},
        "scenario": {"num_tasks": 2, "seed": 3},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="session")
def trained(place) -> Path:
    """The folder of a finished run."""
    assert main(["train", str(place / "config.yaml"), "--training.seed", "5"]) == 0
    return place / "run"


@pytest.fixture
def train(place, tmp_path) -> Callable[..., int]:
    """`train("--dotted.key", "value")` trains the configuration with changes, into a folder of its own."""
    return lambda *words: main(["train", str(place / "config.yaml"), "--output_dir", str(tmp_path / "out"), *words])


@pytest.fixture
def refused(train, tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """`refused("--dotted.key", "value")` returns the one line of the error, after seeing that nothing was trained."""

    def call(*words: str) -> str:
        monkeypatch.setattr(ContinualTrainer, "train", lambda self: pytest.fail("training began"))
        assert train(*words) == 2
        assert not (tmp_path / "out").exists()
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("peft-cl: ")
        return line

    return call
