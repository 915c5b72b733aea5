"""A model card reads back from the Hub's own classes, with the numbers of the run and no others."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_cl import CodaPromptConfig, LinearProbeConfig
from peft_cl.assets import default_backbone
from peft_cl.hub import Paper, model_card, write_model_card
from peft_cl.hub.present_card import check_card
from peft_cl.metrics import RunResults, continual_metrics


MATRIX = np.array([[0.9, math.nan, math.nan], [0.8, 0.71, math.nan], [0.5, 0.62, 0.83]])


def run(finished: int = 3, **fields) -> RunResults:
    matrix = np.where(np.arange(3)[:, None] < finished, MATRIX, math.nan)
    defaults = {
        "method": "CODA-Prompt",
        "peft_type": "CODAPROMPT",
        "base_model": "google/vit-base-patch16-224-in21k",
        "dataset": "uoft-cs/cifar100",
        "scenario": {
            "name": "class-incremental",
            "num_tasks": 3,
            "seed": 7,
            "class_order": ["cat", "dog", "apple", "pear", "bus", "car"],
            "classes_per_task": [2, 2, 2],
            "train_sizes": [100, 120, 140],
            "test_sizes": [20, 20, 20],
        },
        "seed": 5,
        "task_names": ["pets", "fruit", "traffic"],
        "test_sizes": [20, 20, 20],
        "metrics": continual_metrics(matrix) if finished else {},
        "trainable_parameters": 3_840_123,
        "total_parameters": 89_640_123,
        "adapter_bytes": 15_362_048,
        "train_seconds": 345.6,
        "finished_tasks": finished,
        "hyperparameters": {"num_train_epochs": 20, "per_device_train_batch_size": 128, "learning_rate": 0.001},
        "versions": {"peft": "0.21.2", "torch": "2.13.0"},
        "command": "peft-cl train coda.yaml",
    }
    return RunResults(accuracy_matrix=matrix, **{**defaults, **fields})


def read(text: str, folder: Path) -> ModelCard:
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return ModelCard.load(path)


def table_row(card: ModelCard, name: str) -> list[str]:
    """The other cells of the table row that starts with the name."""
    (row,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", card.text, flags=re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def test_metadata_reads_back(tmp_path: Path) -> None:
    card = read(model_card(run(), adapter_id="someone/coda-cifar100", license="apache-2.0"), tmp_path)
    data = card.data.to_dict()
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "image-classification"
    assert data["base_model"] == "google/vit-base-patch16-224-in21k"
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["uoft-cs/cifar100"]
    assert data["license"] == "apache-2.0"
    assert {"peft", "peft-cl", "continual-learning", "class-incremental", "coda-prompt"} <= set(data["tags"])
    assert data["model-index"][0]["name"] == "coda-cifar100"
    assert "language" not in data


def test_results_read_back_as_fractions_that_nobody_has_verified(tmp_path: Path) -> None:
    results = run()
    evaluations = read(model_card(results), tmp_path).data.eval_results
    assert {evaluation.metric_type: evaluation.metric_value for evaluation in evaluations} == {
        "accuracy": pytest.approx(results.metrics["average_accuracy"], abs=1e-6),
        "average_incremental_accuracy": pytest.approx(results.metrics["average_incremental_accuracy"], abs=1e-6),
        "forgetting": pytest.approx(results.metrics["forgetting"], abs=1e-6),
    }
    for evaluation in evaluations:
        assert evaluation.verified is False
        assert (evaluation.dataset_type, evaluation.dataset_name) == ("uoft-cs/cifar100", "cifar100")
        assert evaluation.dataset_args["class_order_seed"] == 7


def test_card_survives_being_loaded_and_saved(tmp_path: Path) -> None:
    path = write_model_card(tmp_path, run())
    before = path.read_text(encoding="utf-8")
    ModelCard.load(path).save(path)
    assert path.read_text(encoding="utf-8") == before


def test_text_has_the_measured_numbers(tmp_path: Path) -> None:
    results = run()
    card = read(model_card(results), tmp_path)
    assert table_row(card, "CODA-Prompt") == ["65.00", "24.50", "5 min 46 s", "3,840,123", "15.36 MB"]
    for name, value in results.metrics.items():
        label = name.replace("_", " ").capitalize().replace("Average accuracy", "Final average accuracy")
        assert f"- {label}: {100 * value:.2f} %" in card.text
    assert table_row(card, "pets")[:3] == ["90.0", "", ""]
    assert table_row(card, "fruit") == ["80.0", "71.0", ""]
    assert table_row(card, "traffic") == ["50.0", "62.0", "83.0"]


def test_protocol_is_that_of_the_run(tmp_path: Path) -> None:
    card = read(model_card(run()), tmp_path)
    expected = {
        "Tasks": "3",
        "Classes per task": "2",
        "Training examples per task": "100, 120, 140",
        "Class order": "drawn with the seed 7",
        "Seed": "5",
        "Epochs per task": "20",
        "Batch size per device": "128",
        "Learning rate": "0.001",
        "Trainable parameters": "3,840,123 of 89,640,123",
        "Command": "`peft-cl train coda.yaml`",
        "Versions": "peft 0.21.2, torch 2.13.0",
    }
    assert {name: table_row(card, name)[0] for name in expected} == expected
    assert "cat, dog, apple, pear, bus, car" in card.text


def test_what_was_not_recorded_is_not_on_the_card() -> None:
    text = model_card(run(scenario={}, hyperparameters={}, versions={}, command=None))
    for name in ("Class order", "Epochs", "Learning rate", "Command", "Versions", "Settings of the method", "None"):
        assert name not in text


def test_steps_take_the_place_of_epochs_where_they_ended_the_training(tmp_path: Path) -> None:
    card = read(model_card(run(hyperparameters={"num_train_epochs": 3, "max_steps": 40})), tmp_path)
    assert table_row(card, "Steps per task") == ["40"]
    assert "Epochs per task" not in card.text
    assert "Steps per task" not in model_card(run(hyperparameters={"num_train_epochs": 3, "max_steps": -1}))


@pytest.mark.parametrize(
    ("peft_type", "method", "arxiv"),
    [("L2P", "L2P", "2112.08654"), ("DUALPROMPT", "DualPrompt", "2204.04799"), ("CODAPROMPT", "Mine", "2211.13218")],
)
def test_paper_of_the_method_is_cited(peft_type: str, method: str, arxiv: str) -> None:
    text = model_card(run(peft_type=peft_type, method=method))
    assert f"https://arxiv.org/abs/{arxiv}" in text
    assert f"eprint = {{{arxiv}}}" in text


def test_method_without_a_paper_cites_none_unless_it_brings_its_own() -> None:
    results = run(peft_type="LINEARPROBE", method="Linear probe")
    text = model_card(results)
    assert "arxiv" not in text.lower() and "bibtex" not in text
    paper = Paper("A toy.", "me2030toy", "On Toys", "Me, It Is", "Toys", 2030, "3001.00001")
    text = model_card(results, paper=paper)
    assert "A toy. The method is from Me et al. (2030), [On Toys](https://arxiv.org/abs/3001.00001)." in text
    assert "@inproceedings{me2030toy," in text


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_unfinished_run_gives_a_card_that_says_so(finished: int, tmp_path: Path) -> None:
    card = read(model_card(run(finished)), tmp_path)
    assert f"**This run is not finished**: {finished} of 3 tasks" in card.text
    assert bool(card.data.eval_results) == bool(finished)
    assert ("Accuracy matrix" in card.text) == bool(finished)
    assert not re.search(r"\bnan\b", str(card), flags=re.IGNORECASE)
    assert "not finished" not in model_card(run())


@pytest.mark.parametrize("name", ["", "  "])
def test_backbone_without_a_name_is_left_out_of_the_metadata(name: str, tmp_path: Path) -> None:
    for text in (model_card(run(), base_model=name), model_card(run(base_model=name))):
        card = read(text, tmp_path)
        assert "base_model" not in card.data.to_dict()
        assert "base_model_relation" not in card.data.to_dict()
        assert "a backbone without a name" in card.text


def test_local_paths_appear_by_the_name_of_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-backbone"
    folder.mkdir()
    text = model_card(run(), base_model=str(folder), dataset=str(tmp_path / "my images"))
    card = read(text, tmp_path)
    assert card.data.base_model is None and "base_model" not in text.split("---")[1]
    assert "a local backbone, `my-backbone`" in card.text
    assert card.data.datasets is None  # a local folder is no data set of the Hub
    assert card.data.eval_results[0].dataset_name == "my images"
    assert str(tmp_path) not in text


def test_relative_folder_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "google" / "vit").mkdir(parents=True)
    assert "base_model: google/vit\n" in model_card(run(), base_model="google/vit")
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in model_card(run(), base_model="google/vit").split("---")[1]


def test_name_that_is_no_hub_id_stays_out_of_the_metadata(tmp_path: Path) -> None:
    card = read(model_card(run(), base_model="my net!", dataset="in-memory images"), tmp_path)
    assert card.data.base_model is None and card.data.datasets is None
    assert "`my net!`" in card.text and "`in-memory images`" in card.text


def test_limits_passed_are_on_the_card() -> None:
    assert "- The backbone derives from Tiny-ImageNet: research use.\n" in model_card(
        run(), limits=["The backbone derives from Tiny-ImageNet: research use."]
    )


def test_names_cannot_break_the_tables(tmp_path: Path) -> None:
    card = read(model_card(run(task_names=["a|b", "c\nd", "e"])), tmp_path)
    assert "| After task | a\\|b | c d | e |" in card.text


def test_settings_of_the_method_come_from_the_adapter(tmp_path: Path) -> None:
    CodaPromptConfig(prompt_length=6).save_pretrained(tmp_path)
    card = ModelCard.load(write_model_card(tmp_path, run()))
    assert table_row(card, "`prompt_length`") == ["`6`"]
    for fact in ("peft_type", "inference_mode", "rows_in_use", "format_version"):
        assert f"`{fact}`" not in card.text
    recorded = read(model_card(run(hyperparameters={"adapter": {"prompt_length": 10}})), tmp_path)
    assert table_row(recorded, "`prompt_length`") == ["`10`"]


@pytest.mark.parametrize("own_processor", [True, False])
def test_usage_example_runs_as_it_stands(own_processor: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = AutoModelForImageClassification.from_pretrained(default_backbone(), dtype="float32")
    model = get_peft_model(base, LinearProbeConfig())
    model.base_model.begin_task(["cat", "dog"])
    model.save_pretrained(tmp_path / "adapter")
    if own_processor:
        AutoImageProcessor.from_pretrained(default_backbone()).save_pretrained(tmp_path / "adapter")
    path = write_model_card(
        tmp_path / "adapter",
        run(base_model=default_backbone(), method="Linear probe", peft_type="LINEARPROBE"),
        adapter_id=str(tmp_path / "adapter"),
    )
    text = path.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert ("AutoImageProcessor.from_pretrained(default_backbone())" in code) != own_processor
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60), "red").save("image.jpg")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip() in ("cat", "dog")


def test_card_takes_the_place_of_the_one_that_peft_wrote(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: ''\n---\n# Model Card for Model ID\n", encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "CODAPROMPT", "layers": [0, 1]}))
    card = ModelCard.load(write_model_card(tmp_path, run()))
    assert card.data.base_model == "google/vit-base-patch16-224-in21k"
    assert "Model ID" not in card.text
    assert table_row(card, "`layers`") == ["`[0, 1]`"]


def test_what_is_not_from_the_paper_is_said():
    settings = {"num_train_epochs": 20, "adapter": {"task_evidence": 6.0}}
    card = model_card(run(method="CODA-Prompt with task evidence", hyperparameters=settings))
    assert "Not from the paper is the task evidence: in evaluation, 6 times the cosine" in card
    assert "task evidence" not in model_card(run())


def test_what_was_measured_ahead_and_told_of_tasks_is_on_the_card(tmp_path: Path) -> None:
    measured = np.where(np.isnan(MATRIX), 0.25, MATRIX)
    metrics = continual_metrics(measured, test_sizes=[20, 20, 40], baseline=[0.5, 0.25, 0.125])
    told = {"metrics": metrics, "baseline": [0.5, 0.25, 0.125], "task_identification": 0.625}
    results = RunResults(**{**vars(run()), **told, "accuracy_matrix": measured.tolist()})
    card = read(model_card(results), tmp_path)
    assert "- Forward transfer: 6.25 %" in card.text and "- Overall accuracy: 69.50 %" in card.text
    assert "- Task identification: 62.50 % (share of" in card.text
    assert table_row(card, "pets")[:3] == ["90.0", "25.0", "25.0"]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("peft-cl train /home/me/c.yaml --dataset /home/me/data/ -x", "peft-cl train c.yaml --dataset data -x"),
        ("peft-cl train '/home/me/my runs/c d.yaml' --dataset ../x/birds", "peft-cl train 'c d.yaml' --dataset birds"),
        ("train c.yaml --dataset '{a: ~/x/y, b: {path: /me/z}}'", "train c.yaml --dataset '{a: y, b: {path: z}}'"),
        ("train c.yaml --training.image_cache_dir=/scratch/me", "train c.yaml --training.image_cache_dir=me"),
        (r"train 'C:\Users\me\c.yaml'", "train c.yaml"),
        ("python /home/me/what's this", "python what's this"),
        *[(same, same) for same in ("train c.yaml --model owner/vit --output_dir out/run", "train https://a.b/c d/e")],
    ],
)
def test_the_command_does_not_say_where_folders_lie(command: str, shown: str, tmp_path: Path) -> None:
    card = read(model_card(run(command=command)), tmp_path)
    assert table_row(card, "Command") == [f"`{shown}`"]


def test_the_matrix_is_shown_where_it_lies_beside_the_card(tmp_path: Path) -> None:
    assert "![" not in write_model_card(tmp_path, run()).read_text()
    (tmp_path / "accuracy_matrix.png").write_bytes(b"")
    text = write_model_card(tmp_path, run()).read_text()
    matrix, picture = text.index("### Accuracy matrix"), text.index("](accuracy_matrix.png)")
    assert matrix < picture < text.index("## Protocol")
    assert "![" not in write_model_card(tmp_path, run(finished=0)).read_text()


@pytest.mark.parametrize("license", ["My own", "MIT License", "", "-"])
def test_a_licence_that_is_no_identifier_is_refused_before_a_card_is_written(license: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="license is .*but must be an identifier of the Hub, such as apache-2.0"):
        write_model_card(tmp_path, run(), license=license)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("base_model: a/b/c", "base_model is 'a/b/c'"),
        ("base_model: [a/b, ../c]", "base_model is '../c'"),
        ("datasets: [7]", "datasets is 7"),
        ("tags: ['']", "tags is"),
        ("pipeline_tag: Image Classification", "pipeline_tag is 'Image Classification'"),
        ("- a list", "cannot be read"),
        ("a: {", "cannot be read"),
        ("model-index: 3", "cannot be read"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_named(metadata: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_card(f"---\n{metadata}\n---\n# Card\n")


def test_every_card_of_ours_has_valid_metadata(tmp_path: Path) -> None:
    odd = {
        "method": "Ünï # method",
        "dataset": "in-memory: images",
        "base_model": "- [x]",
        "task_names": ["a: b", "#", "---"],
    }
    for results in (run(), run(0), run(**odd)):
        check_card(model_card(results, adapter_id="user/x", license="cc-by-4.0"))
