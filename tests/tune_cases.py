"""What the tests of `peft-cl tune` share: a configuration with a search, and a search that was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Image

from peft_cl.cli import main
from peft_cl.commands.trial import Trials


SEARCH = {
    "training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    "adapter.components_per_task": [2, 3, 90],
}


@pytest.fixture(name="configuration", scope="module")
def make_configuration(place, tmp_path_factory) -> Path:
    """A configuration with a search, its test images of bytes that are none; with 90 components trials fail."""
    folder = tmp_path_factory.mktemp("tune")
    shutil.copytree(place / "data", folder / "data")
    test = Dataset.from_parquet(str(folder / "data" / "test.parquet"))
    unreadable = [{"bytes": f"no image {row}".encode(), "path": None} for row in range(len(test))]
    labels, features = test["label"][:], test.features
    broken = Dataset.from_dict({"label": labels}).add_column("image", unreadable)
    broken = broken.cast_column("image", Image()).cast_column("label", features["label"])
    broken.to_parquet(str(folder / "data" / "test.parquet"))
    config = yaml.safe_load((place / "config.yaml").read_text())
    config |= {"dataset": {"path": str(folder / "data")}, "search": SEARCH}
    config["training"] |= {"max_steps": 2}
    (folder / "tune.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "tune.yaml"


def tune(configuration: Path, folder: Path, *words: str) -> int:
    return main(
        ["tune", str(configuration), "--output_dir", str(folder), "--trials", "3", "--holdout", "0.25", *words]
    )


def outcomes(folder: Path) -> list[dict]:
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    return [{name: value for name, value in each.items() if name != "seconds"} for each in trials]


def unfit(self, number, settings, watch):
    """A trial that fails where it has 90 components, in the middle of it."""
    if settings["adapter.components_per_task"] == 90:
        settings = {**settings, "adapter.layers": [7]}
    return CALL(self, number, settings, watch)


CALL = Trials.__call__


@pytest.fixture(name="tuned", scope="module")
def make_tuned(configuration, tmp_path_factory) -> Path:
    """The folder of a search of three trials, of which one fails."""
    folder = tmp_path_factory.mktemp("tuned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "__call__", unfit)
        assert tune(configuration, folder, "--sampler-seed", "2") == 0
    return folder
