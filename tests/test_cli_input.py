"""What the command refuses, and what it says."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from cli_fixtures import pictures
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig
from peft_cl.cli import main
from peft_cl.hub.terms import NOT_SETTINGS


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "codda"], ["codda", "Did you mean coda?", "nearest-class-mean"]),
        (["--methd", "coda"], ["--methd", "Did you mean --method?"]),
        (["--preset", "papre"], ["papre", "Did you mean paper?", "official"]),
        (["--training.learning_rat", "1"], ["Did you mean training.learning_rate?", "training.learning_rat"]),
        (["--training.output_dir", "x"], ["training.output_dir"]),
        (["--training.learning_rate", "fast"], ["'fast'", "a number"]),
        (["--training.learning_rates", "0.1"], ["training.learning_rates", "a mapping"]),
        (["--training.lr_scheduler_type", "constnat"], ["constnat", "constant"]),
        (["--training.learning_rate_per_256", "0.03"], ["both", "null"]),
        (["--training.label_smoothing_factor", "0.1"], ["label_smoothing_factor"]),
        (["--training.num_train_epochs", "0"], ["num_train_epochs is 0", "a number above 0"]),
        (["--training.per_device_train_batch_size", "0"], ["per_device_train_batch_size is 0", "at least 1"]),
        (["--training.gradient_accumulation_steps", "0"], ["gradient_accumulation_steps is 0", "at least 1"]),
        (["--training.seed", "-1"], ["seed is -1", "at least 0"]),
        (["--training.learning_rates", "{prompts: -1}"], ["'prompts' the rate -1", "at least 0"]),
        (["--training.num_train_epochs"], ["--training.num_train_epochs has no value"]),
        (["--adapter.top_k", "3"], ["adapter.top_k", "components_per_task"]),
        (["--adapter.classes", "[a]"], ["adapter.classes"]),
        (["--adapter.components_per_task", "0"], ["components_per_task is 0"]),
        (["--adapter.layers", "[0, 7]"], ["layers [7]", "2 layers"]),
        (["--adapter.pool_size", "3"], ["pool_size is 3", "task 2"]),
        (["--model.name", "./nowhere"], ["'./nowhere'", "no such folder"]),
        (["--model.dtype", "float8"], ["'float8'", "bfloat16"]),
        (["--model.attn_implementation", "eagr"], ["eagr", "sdpa"]),
        (
            ["--model.dtype", "bfloat16", "--method", "fine-tuning", "--preset", "null", "--adapter", "{}"],
            ["float32", "fine-tuning"],
        ),
        (["--dataset.path", "./nowhere"], ["data set './nowhere'", "no such folder"]),
        (["--dataset.label_column", "lable"], ["'lable'", "['image', 'label']"]),
        (["--dataset.image_column", "img"], ["'img'", "['image', 'label']"]),
        (["--dataset.test_split", "validation"], ["'validation'", "['train', 'test']"]),
        (["--dataset.test_fraction", "1.5"], ["test_fraction is 1.5"]),
        (["--scenario.num_tasks", "9"], ["4 classes", "9 tasks"]),
        (["--scenario.class_order", "[red]"], ["seed 3", "class_order"]),
        (["--scenario", "{}"], ["scenario", "num_tasks is missing"]),
        (["--scenario.kind", "class-incrementl"], ["class-incrementl", "task-incremental"]),
        (["--scenario.kind", "domain-incremental"], ["num_tasks does not go with the kind domain-incremental"]),
        (["--scenario.domain_order", "[red]"], ["domain_order does not go with the kind class-incremental"]),
        (["--scenario.classes_per_task", "[2, 2]"], ["classes_per_task", "leave num_tasks"]),
        (["--augmentation.scale", "[0.5]"], ["augmentation.scale", "a list of 2"]),
        (["--augmentation.flip", "2"], ["flip"]),
        (["--processor.do_normalise", "false"], ["Did you mean processor.do_normalize?"]),
        (["--dataset", "[1"], ["YAML"]),
    ],
)
def test_bad_settings_are_refused_before_training(refused, words, expected):
    message = refused(*words)
    assert all(part in message for part in expected), message


def test_a_data_set_with_one_split_names_the_remedy(refused, place):
    assert "has no split 'test'; it has ['train']. Set dataset.test_split, or dataset.test_fraction" in refused(
        "--dataset.path", str(place / "single")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 0.1", "training.learning_rate exists"),
        ("method: l2p\nmethod: coda", "more than once"),
        ("- l2p", "no sections"),
        ("method: [", "YAML"),
        ("model: vit-tiny-64", "method is missing"),
    ],
)
def test_bad_files_are_refused(tmp_path, capsys, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert expected in capsys.readouterr().err


def test_a_damaged_data_file_is_said(refused, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    assert "broken' cannot be loaded" in refused("--dataset.path", str(tmp_path / "broken"))


def test_missing_files_are_named(tmp_path, capsys):
    for command in (
        ["train", "no.yaml"],
        ["info", "./no"],
        ["plot", "./no"],
        ["evaluate", "./no", "--dataset", "./d"],
    ):
        assert main(command) == 2
        assert "no" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 2
    assert "adapter_config.json and no adapter_model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
        ("adapter_config.json", b"{"),
        ("results.json", b'{"format_version": 1}'),
    ],
)
def test_a_damaged_adapter_is_named(trained, tmp_path, capsys, file, content):
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(content)
    assert main(["info", str(tmp_path / "copy")]) == 2
    message = capsys.readouterr().err
    assert re.search("damaged|cannot be read", message) and "Traceback" not in message


def test_evaluate_refuses_what_does_not_fit(trained, place, tmp_path, capsys):
    pictures(2, 0).rename_column("label", "kind").to_parquet(tmp_path / "test.parquet")
    command = ["evaluate", str(trained), "--dataset"]
    for words, expected in (
        ([str(place / "data"), "--split", "validation"], "'validation'"),
        ([str(place / "data"), "--label-column", "lable"], "'lable'"),
        ([str(tmp_path)], "'label'"),
        ([str(place / "data"), "--model", "vit-tiny-64"], "does not fit"),
        ([str(place / "data"), "--batch-size", "0"], "--batch-size is 0"),
    ):
        assert main([*command, *words]) == 2
        assert expected in capsys.readouterr().err


def test_adapters_of_other_methods_are_refused(place, tmp_path, capsys):
    base = AutoModelForImageClassification.from_pretrained(place / "model")
    get_peft_model(base, LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path)
    for command in (["info", str(tmp_path)], ["evaluate", str(tmp_path), "--dataset", str(place / "data")]):
        assert main(command) == 2
        assert "is of the PEFT type LORA, which is none of peft_cl's" in capsys.readouterr().err.replace(
            "PeftType.", ""
        )


def test_the_help_of_train_lists_every_setting_with_its_own_text(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for config_class in (L2PConfig, DualPromptConfig, CodaPromptConfig):
        for each in fields(config_class):
            if each.name not in NOT_SETTINGS:
                assert f" {each.name} (" in text, each.name
                assert " ".join(each.metadata["help"].split()) in text, each.name
    for name in ("images_per_class", "per_task", "validation_fraction"):
        assert f" {name} (null)" in text
