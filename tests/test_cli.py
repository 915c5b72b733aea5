"""The command `peft-cl`: what it trains it can describe and measure again; bad input is refused before training."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_fixtures import COLOURS, pictures
from peft import PeftModel
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification

from peft_cl import ContinualTrainer, LinearProbeConfig, RunResults
from peft_cl.cli import main
from peft_cl.commands import demo, digits
from peft_cl.commands.options import read_config
from peft_cl.commands.settings import make_settings
from peft_cl.heads import HEADS, Sizes


EXAMPLES = Path(__file__).parents[1] / "examples"
# ----------------------------------------------------------------------------------------------- a run


def test_train_writes_adapter_processor_results_card_and_pictures(trained, place):
    files = {path.name for path in trained.iterdir()}
    assert files >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "preprocessor_config.json",
        "results.json",
        "README.md",
        "accuracy_matrix.png",
        "curves.png",
        "key_similarity.png",
    }
    assert "prompt_usage.png" not in files  # CODA-Prompt weighs all rows, it chooses none
    results = RunResults.load(trained)
    assert results.finished_tasks == 2
    assert results.seed == 5
    assert results.command.startswith("peft-cl train ") and results.command.endswith("--training.seed 5")
    card = (trained / "README.md").read_text()
    assert "CODA-Prompt" in card and "`peft-cl train config.yaml" in card
    # Where things lie is in the record, to run it again, and not on the card.
    assert str(place) not in card and str(place) in (trained / "results.json").read_text()


def test_info_agrees_with_the_results_and_needs_no_base_model(trained, place, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert main(["info", str(trained), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    results = RunResults.load(trained)
    assert facts["method"] == results.method == "CODA-Prompt"
    assert sum(facts["tasks"], []) == results.scenario["class_order"]
    assert facts["rows_in_use"] == 4
    assert facts["file_bytes"] == results.adapter_bytes
    # P (4 x 24), K and A (24 each) for 2 layers and 4 components; a head of 4 classes.
    counts = {name: part["count"] for name, part in facts["parameters"].items()}
    assert counts == {"attention": 192, "head": 100, "keys": 192, "prompts": 768}
    assert main(["info", str(trained)]) == 0
    text = capsys.readouterr().out
    assert f"{100 * results.metrics['average_accuracy']:.2f}" in text
    assert all(colour in text for colour in COLOURS)


def test_evaluate_repeats_the_accuracies_of_the_run(trained, place, capsys):
    command = ["evaluate", str(trained), "--dataset", str(place / "data"), "--batch-size", "7"]
    assert main([*command, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    results = RunResults.load(trained)
    assert list(measured["tasks"].values()) == pytest.approx(results.accuracy_matrix[-1])
    assert measured["average_accuracy"] == pytest.approx(results.metrics["average_accuracy"])
    assert measured["images"] == sum(results.test_sizes) and measured["left_out"] == 0
    assert measured["accuracy"] == pytest.approx(np.mean(list(measured["classes"].values())))  # 5 images of each
    assert set(measured["classes"]) == set(COLOURS)
    assert main(command) == 0
    assert f"{measured['accuracy']:.2%}" in capsys.readouterr().out


def test_evaluate_maps_classes_by_name_and_counts_what_it_leaves_out(trained, place, tmp_path, capsys):
    data = pictures(3, 4).filter(lambda row: row["label"] != 0)
    names = np.array(["red", "green", "violet", "yellow"])[data["label"]].tolist()
    data.remove_columns("label").add_column("colour", names).to_parquet(tmp_path / "test.parquet")
    command = ["evaluate", str(trained), "--dataset", str(tmp_path), "--label-column", "colour"]
    assert main([*command, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["images"], measured["left_out"]) == (6, 3)
    assert measured["classes"]["red"] is None and measured["classes"]["green"] is not None


def test_a_run_in_the_output_folder_is_kept_unless_overwrite(place, trained, capsys, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "backbone").mkdir()
    (tmp_path / "out" / "prompt_usage.png").touch()
    command = ["train", str(place / "config.yaml"), "--output_dir", str(tmp_path / "out"), "--training.max_steps", "1"]
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert RunResults.load(tmp_path / "out").hyperparameters["max_steps"] == 1
    assert not (tmp_path / "out" / "backbone").exists()  # left by another method, it would be taken for the base
    assert not (tmp_path / "out" / "prompt_usage.png").exists()


@pytest.mark.parametrize(
    ("method", "preset"),
    [
        *((method, preset) for method in ("l2p", "dualprompt", "coda") for preset in ("null", "paper")),
        *((method, "null") for method in ("frozen", "linear-probe", "nearest-class-mean")),
    ],
)
def test_every_method_trains_from_a_configuration(train, tmp_path, method, preset):
    """Without a preset a method begins with "best", which suits a head of statistics."""
    layers = {"l2p": "{layers: [1], top_k: 2}", "dualprompt": "{layers: [1], g_layers: [0]}", "coda": "{layers: [1]}"}
    adapter = "{top_k: 2, prompt_length: 2}" if (method, preset) == ("l2p", "paper") else layers.get(method, "{}")
    words = ("--method", method, "--preset", preset, "--adapter", adapter, "--training.max_steps", "1")
    assert train(*words) == 0
    results = RunResults.load(tmp_path / "out")
    assert results.finished_tasks == 2
    is_best = preset == "null" and method not in ("linear-probe", "nearest-class-mean")
    best = "lda" if method == "frozen" else "fusion"
    assert results.hyperparameters["adapter"].get("head", "linear") == (best if is_best else "linear")
    assert (tmp_path / "out" / "head_sums.safetensors").is_file() == is_best


def test_a_run_is_resumed(train, tmp_path, capsys, monkeypatch):
    assert train("--output_dir", str(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        learn = ContinualTrainer.train_task
        stop = lambda self, task: learn(self, task) if task.index == 0 else 1 / 0  # noqa: E731
        patch.setattr(ContinualTrainer, "train_task", stop)
        with pytest.raises(ZeroDivisionError):
            train()
    assert RunResults.load(tmp_path / "out").finished_tasks == 1
    assert train("--resume", "--training.learning_rate", "0.5") == 2
    assert "learning_rate: was 0.02, is 0.5" in capsys.readouterr().err
    assert train("--resume") == 0
    results, expected = (RunResults.load(tmp_path / name) for name in ("out", "whole"))
    assert results.finished_tasks == 2 and results.accuracy_matrix == expected.accuracy_matrix
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("scenario", "names", "classes"),
    [
        ("{kind: task-incremental, num_tasks: 2}", ["task_0", "task_1"], [2, 2]),
        ("{classes_per_task: [1, 3]}", ["task_0", "task_1"], [1, 3]),
        ("{num_tasks: 2, first_task_classes: 3}", ["task_0", "task_1"], [3, 1]),
        ("{kind: domain-incremental, domain_column: light, domain_order: [night, day]}", ["night", "day"], [4, 4]),
    ],
)
def test_every_kind_of_scenario_trains_from_a_configuration(train, place, tmp_path, capsys, scenario, names, classes):
    if "light" in scenario:
        (tmp_path / "domains").mkdir()
        for split, rows in (("train", (8, 0)), ("test", (5, 1))):
            examples = pictures(*rows)
            lights = ["day", "night"] * (len(examples) // 2)
            examples.add_column("light", lights).to_parquet(tmp_path / "domains" / f"{split}.parquet")
        data = ("--dataset.path", str(tmp_path / "domains"))
    else:
        data = ()
    assert train(*data, "--scenario", scenario, "--training.max_steps", "1") == 0
    results = RunResults.load(tmp_path / "out")
    assert results.task_names == names and results.scenario["classes_per_task"] == classes
    kind = scenario.partition("kind: ")[2].partition(",")[0] or "class-incremental"
    assert results.scenario["name"] == kind and f"2, {kind}, classes of each: " in capsys.readouterr().out


def test_fine_tuning_keeps_the_backbone_it_trained(train, place, tmp_path, capsys):
    assert train("--method", "fine-tuning", "--preset", "null", "--adapter", "null") == 0
    results = RunResults.load(tmp_path / "out")
    capsys.readouterr()
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    assert main(["evaluate", str(moved), "--dataset", str(place / "data"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert list(measured["tasks"].values()) == pytest.approx(results.accuracy_matrix[-1])
    assert "folder `backbone`" in (moved / "README.md").read_text()


def test_one_split_is_divided_alike_in_training_and_evaluation(train, place, tmp_path, capsys):
    fraction = ("--dataset.path", str(place / "single"), "--dataset.test_fraction", "0.3", "--training.max_steps", "2")
    assert train(*fraction) == 0
    results = RunResults.load(tmp_path / "out")
    assert results.scenario["train_sizes"] == [14, 14] and results.test_sizes == [6, 6]
    assert "| Test examples from | 30% of train, drawn with seed 0 |" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    command = [
        "evaluate",
        str(tmp_path / "out"),
        "--dataset",
        str(place / "single"),
        "--test-fraction",
        "0.3",
        "--json",
    ]
    assert main(command) == 0
    measured = json.loads(capsys.readouterr().out)
    assert list(measured["tasks"].values()) == pytest.approx(results.accuracy_matrix[-1])


def test_an_image_folder_trains_with_augmentation_and_changed_processor(train, tmp_path):
    photos = tmp_path / "photos"
    for index, row in enumerate(pictures(4, 6)):
        folder = photos / ("test" if index % 4 == 0 else "train") / list(COLOURS)[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].resize((20, 24)).save(folder / f"{index}.png")
    words = ("--dataset.path", str(photos), "--processor.do_normalize", "false", "--augmentation.scale", "[0.5, 1.0]")
    assert train(*words, "--training.max_steps", "1") == 0
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["do_normalize"] is False
    assert "scale=(0.5, 1.0)" in RunResults.load(tmp_path / "out").hyperparameters["augmentation"]


def test_learning_rate_is_scaled_by_the_batch_and_said(train, tmp_path, capsys):
    words = ["--training.learning_rate", "null", "--training.learning_rate_per_256", "3e-2"]
    assert train(*words, "--training.gradient_accumulation_steps", "2", "--training.max_steps", "1") == 0
    assert RunResults.load(tmp_path / "out").hyperparameters["learning_rate"] == pytest.approx(0.03 * 16 / 256)
    assert "0.001875 = 0.03 x 16 images in a step / 256" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- bad input


# ----------------------------------------------------------------------------------------------- examples and demo


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(path):
    config = read_config(path)
    config.pop("search", None)  # of peft-cl tune
    settings = make_settings(config)
    config_class = settings.method.config_class
    assert isinstance(settings.adapter, config_class)
    assert settings.preset in config_class.presets
    settings.adapter.check_next_task(settings.scenario.num_tasks - 1)
    assert settings.training.learning_rate > 1e-4


def test_examples_of_the_jax_family_scale_the_learning_rate_by_the_batch():
    rates = {name: make_settings(read_config(EXAMPLES / f"{name}.yaml")).training.learning_rate for name in RATES}
    assert rates == pytest.approx(RATES)


RATES = {
    "cifar100_l2p": 0.015,
    "cifar100_dualprompt": 0.015,
    "cifar100_coda": 0.001,
    "imagenet_r_l2p": 0.00375,
    "imagenet_r_dualprompt": 0.00375,
    "imagenet_r_coda": 0.001,
}


def test_the_example_script_runs(tmp_path, capsys, monkeypatch):
    small = digits.load_digits_dataset(per_digit=8)
    monkeypatch.setattr(digits, "load_digits_dataset", lambda: small)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "class_incremental.py"))
    assert re.search(r"digit \d, predicted \d", capsys.readouterr().out)


def test_a_head_of_ones_own_is_one_class(tmp_path, capsys, monkeypatch):
    small = digits.load_digits_dataset(per_digit=16)
    monkeypatch.setattr(digits, "load_digits_dataset", lambda: small)
    monkeypatch.chdir(tmp_path)
    module = runpy.run_path(str(EXAMPLES / "custom_head.py"), run_name="__main__")
    (percent,) = re.findall(r"Frozen features \+ naive Bayes: (\d+\.\d)% of the digits", capsys.readouterr().out)
    assert float(percent) > 60  # guessing: 10
    # Its sums join, as those of all heads do.
    features, labels = torch.randn(60, 6), torch.arange(60) % 3
    whole, *halves = (module["NaiveBayesHead"](Sizes(6, 6), 3) for _ in range(3))
    for head, rows in ((whole, slice(None)), (halves[0], slice(30)), (halves[1], slice(30, None))):
        head.observe(features[rows], labels[rows])
        head.fit()
    halves[0].add(halves[1], range(3))
    halves[0].fit()
    torch.testing.assert_close(halves[0](features), whole(features))
    with pytest.raises(ValueError, match="floor is 2"):
        LinearProbeConfig(head="naive-bayes", head_options={"floor": 2})
    del HEADS["naive-bayes"]


def test_the_demo_compares_all_methods_and_uses_an_adapter(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "TASKS", 2)  # in place of 5, for time
    loaded = []
    original = PeftModel.from_pretrained.__func__
    monkeypatch.setattr(
        PeftModel,
        "from_pretrained",
        classmethod(lambda cls, model, path, **options: loaded.append(path) or original(cls, model, path, **options)),
    )
    assert main(["demo", "--quick", "--output", str(tmp_path / "demo")]) == 0
    text = capsys.readouterr().out
    best = ["Frozen features + kernel LDA", "CODA-Prompt + LDA and kernel LDA of the query"]
    for method in (*best, "CODA-Prompt", "Linear probe", "Fine-tuning", "Nearest class mean"):
        assert f"| {method} |" in text
    (path,) = loaded
    assert Path(path).parent == tmp_path / "demo"
    assert re.search(r"of the digit \d: the model says \d \(probability \d+%\)", text)
    assert PILImage.open(tmp_path / "demo" / "comparison.png").width > 1000


def test_a_run_that_was_cut_off_between_its_adapter_and_its_state_is_resumed(place, tmp_path, monkeypatch):
    """In its first task there is no state before; the adapter that lies there is not taken for one that lost it."""
    words = [
        "train",
        str(place / "config.yaml"),
        "--output_dir",
        str(tmp_path / "out"),
        "--training.pictures",
        "false",
    ]

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("peft_cl.trainer.resuming.ResumableTrainer.save_snapshot", cut)
        assert main(words) == 130
    assert (tmp_path / "out" / "results.json").is_file()
    assert main([*words, "--resume"]) == 0
    assert RunResults.load(tmp_path / "out").finished_tasks == 2
