"""What of an adapter's folder is shared, and what is refused before anything is sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_cl import L2PConfig, LinearProbeConfig, RunResults, push_adapter
from peft_cl.assets import default_backbone
from peft_cl.hub.cleaned import cleaned_config, cleaned_record, shared_base
from peft_cl.hub.shared_files import WITH_BACKBONE, files_to_share
from peft_cl.strategies import FineTuning
from peft_cl.strategies.fine_tuning import BACKBONE_FOLDER
from peft_cl.strategies.lora import LORA_FOLDER


ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "README.md"}


def saved(folder: Path, config, base=None) -> Path:
    """An adapter that `save_pretrained` wrote, with the sums of its head."""
    if base is None:
        base = AutoModelForImageClassification.from_pretrained(default_backbone(), dtype="float32")
    model = get_peft_model(base, config)
    model.begin_task(["cat", "dog"])
    if model.base_model.head.active.observes:
        pixels = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        model.fit_head([{"pixel_values": pixels, "labels": torch.tensor([0, 1] * 4)}])
    model.save_pretrained(folder)
    model.save_sums(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("saved") / "adapter", LinearProbeConfig(head="lda"))


@pytest.fixture
def adapter(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def test_an_adapter_that_was_saved_by_hand_gets_card_and_processor(adapter):
    files, config = files_to_share(adapter, "user/probe")
    assert files.keys() == ADAPTER | {"head_sums.safetensors"} and config.classes == ["cat", "dog"]
    text = files["README.md"].decode()
    assert "[More Information Needed]" not in text and 'PeftModel.from_pretrained(base, "user/probe")' in text
    assert {"peft", "continual-learning", "linear-probe"} <= set(ModelCard(text).data.tags)
    own = AutoImageProcessor.from_pretrained(default_backbone()).to_dict()
    assert json.loads(files["preprocessor_config.json"])["image_mean"] == list(own["image_mean"])


def test_sums_are_left_out_where_they_are_not_wanted(adapter):
    assert files_to_share(adapter, "user/probe", sums=False)[0].keys() == ADAPTER


def test_nothing_unknown_is_shared(adapter):
    for name in ("training_args.bin", "notes.txt", "optimizer.pt", "model.safetensors", "config.json", ".env"):
        (adapter / name).write_bytes(b"mine")
    for name in (
        "_state/sequence.pt",
        "checkpoint-3/adapter_model.safetensors",
        "runs/events",
        "backbone/config.json",
    ):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_bytes(b"mine")
    assert files_to_share(adapter, "user/probe")[0].keys() == ADAPTER | {"head_sums.safetensors"}


def test_a_card_of_ones_own_stays_and_gets_the_name(adapter):
    own = '---\nlicense: mit\n---\n# Mine\n\n`PeftModel.from_pretrained(base, "path/to/adapter")`\n'
    (adapter / "README.md").write_text(own)
    shared = files_to_share(adapter, "user/probe")[0]["README.md"].decode()
    assert shared == own.replace("path/to/adapter", "user/probe")


def test_an_adapter_with_a_name_is_shared_as_the_one_that_the_folder_holds(tmp_path):
    base = AutoModelForImageClassification.from_pretrained(default_backbone(), dtype="float32")
    model = get_peft_model(base, L2PConfig(pool_size=2, prompt_length=1, top_k=1), adapter_name="birds")
    model.begin_task(["owl"])
    model.save_pretrained(tmp_path / "run")
    files, _ = files_to_share(tmp_path / "run", "user/birds")
    assert files.keys() == ADAPTER and files["adapter_model.safetensors"].parent.name == "birds"
    shutil.copytree(tmp_path / "run" / "birds", tmp_path / "run" / "cats")
    with pytest.raises(ValueError, match=r"several: \['birds', 'cats'\]. Give the folder of the adapter itself"):
        files_to_share(tmp_path / "run", "user/birds")


def test_a_backbone_that_was_trained_goes_with_its_adapter(make_trainer, tmp_path):
    make_trainer(LinearProbeConfig(train_mask=False), strategy=FineTuning(), num_train_epochs=1).train()
    files, _ = files_to_share(tmp_path / "run", "user/tuned")
    assert {"backbone/model.safetensors", "backbone/config.json", "model.safetensors", "config.json"} < files.keys()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "backbone"
    assert "All weights of the backbone were trained" in files["README.md"].decode()
    with pytest.raises(ValueError, match="the backbone was trained with this adapter"):
        files_to_share(tmp_path / "run", "user/tuned", base_model="google/vit")
    shutil.rmtree(tmp_path / "run" / "backbone")
    with pytest.raises(ValueError, match="there is no folder 'backbone'"):
        files_to_share(tmp_path / "run", "user/tuned")


def test_the_folders_of_trained_backbones_are_those_that_strategies_write():
    assert WITH_BACKBONE == (BACKBONE_FOLDER, LORA_FOLDER)


# --------------------------------------------------------------------------------------------------- local folders


@pytest.fixture
def on_a_folder(tmp_path, tiny_vit):
    base = tmp_path / "my nets" / "tiny"
    tiny_vit().save_pretrained(base)
    loaded = AutoModelForImageClassification.from_pretrained(base)
    return saved(tmp_path / "adapter", LinearProbeConfig(), loaded)


def test_a_backbone_in_a_folder_is_named_without_its_place(on_a_folder, tmp_path):
    with pytest.warns(UserWarning, match=r"'tiny', which others do not have; it is shared as 'path/to/tiny'\. Name"):
        files, _ = files_to_share(on_a_folder, "user/probe")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "path/to/tiny"
    for name, content in files.items():
        assert str(tmp_path).encode() not in (content if isinstance(content, bytes) else content.read_bytes()), name


def test_its_name_on_the_hub_takes_the_place(on_a_folder, recwarn):
    (on_a_folder / "preprocessor_config.json").write_text("{}")
    files, _ = files_to_share(on_a_folder, "user/probe", base_model="google/vit-tiny")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "google/vit-tiny"
    text = files["README.md"].decode()
    assert ModelCard(text).data.base_model == "google/vit-tiny"
    assert 'AutoModelForImageClassification.from_pretrained("google/vit-tiny", dtype="float32")' in text
    assert not [each for each in recwarn if "others do not have" in str(each.message)]


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("google/vit", "google/vit"),
        ("vit-tiny-64", "vit-tiny-64"),
        ("backbone", "backbone"),
        ("/home/anna/nets/vit", "path/to/vit"),
        ("./vit", "path/to/vit"),
        ("path/to/vit", "path/to/vit"),
        (None, None),
    ],
)
def test_names_of_base_models_that_are_shared(name, shared):
    assert shared_base(name) == shared


def test_a_record_is_shared_without_places(tmp_path):
    results = RunResults(
        method="L2P",
        peft_type="L2P",
        base_model="/home/anna/nets/vit",
        dataset="/data/anna/birds",
        scenario={"name": "class-incremental", "class_order": ["/odd", "a/b"]},
        seed=0,
        task_names=["/first"],
        accuracy_matrix=[[0.5]],
        test_sizes=[4],
        metrics={"average_accuracy": 0.5},
        trainable_parameters=1,
        total_parameters=2,
        adapter_bytes=3,
        train_seconds=1.0,
        finished_tasks=1,
        hyperparameters={"data": {"path": "~/birds", "splits": ["train"]}, "lr": 0.1, "augmentation": "Crop(/x/y.py)"},
        command="peft-cl train /home/anna/c.yaml --output_dir=../out",
    )
    shared = cleaned_record(results)
    assert (shared.base_model, shared.dataset) == ("vit", "birds")
    assert shared.command == "peft-cl train c.yaml --output_dir=out"
    assert shared.hyperparameters == {
        "data": {"path": "birds", "splits": ["train"]},
        "lr": 0.1,
        "augmentation": "Crop(y.py)",
    }
    # What may look like a path and is a name stays, as the rows of the matrix and of the head go by it.
    assert shared.task_names == ["/first"] and shared.scenario["class_order"] == ["/odd", "a/b"]
    assert cleaned_config({"classes": ["/odd"], "init_from": "/home/x"}) == {
        "classes": ["/odd"],
        "init_from": "x",
        "base_model_name_or_path": None,
    }


# --------------------------------------------------------------------------------------------------- refused


def weights_with(adapter: Path, change) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: change(value) for name, value in tensors.items()}, adapter / "adapter_model.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def record_of_others(adapter: Path) -> None:
    make = {"method": "L2P", "peft_type": "L2P", "base_model": "a/b", "dataset": "c/d", "scenario": {}, "seed": 0}
    counts = {"trainable_parameters": 1, "total_parameters": 2, "adapter_bytes": 3, "train_seconds": 1.0}
    tasks = {"task_names": ["a"], "accuracy_matrix": [[0.5]], "test_sizes": [4], "metrics": {}, "finished_tasks": 1}
    RunResults(**make, **counts, **tasks).save(adapter / "results.json")


DAMAGES = {
    "a file cut short": (lambda folder: cut(folder / "adapter_model.safetensors"), "is damaged or cut short"),
    "sums cut short": (lambda folder: cut(folder / "head_sums.safetensors"), "is damaged or cut short"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "it has no adapter_model"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "there is none"),
    "a damaged configuration": (lambda folder: (folder / "adapter_config.json").write_text("{"), "is damaged"),
    "numbers that are none": (
        lambda folder: weights_with(folder, lambda value: value * float("nan")),
        "numbers that are not finite",
    ),
    "a damaged record": (lambda folder: (folder / "results.json").write_text("{}"), "has no format_version"),
    "a record of others": (record_of_others, "tells of other tasks than the adapter has learnt"),
    "a damaged processor": (lambda folder: (folder / "preprocessor_config.json").write_text("["), "is damaged"),
    "no picture": (lambda folder: (folder / "curves.png").write_text("secret"), "is no picture"),
    "a licence that is none": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: My own!\n---\n"),
        "license is 'My own!' in the metadata of README.md, but must be an identifier",
    ),
    "a base model that is a folder": (
        lambda folder: (folder / "README.md").write_text("---\nbase_model: /home/me/vit\n---\n"),
        "base_model is '/home/me/vit' in the metadata of README.md",
    ),
    "metadata that cannot be read": (
        lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"),
        "The metadata of README.md cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_refused_before_anything_is_sent(name, adapter):
    """Offline a request would be an error of another kind."""
    damage, reason = DAMAGES[name]
    damage(adapter)
    with pytest.raises(ValueError, match=reason):
        push_adapter(adapter, "user/probe")


def test_a_link_that_leads_outside_is_refused(adapter, tmp_path):
    (tmp_path / "secret").write_bytes(b"\x89PNG\r\n\x1a\n")
    (adapter / "curves.png").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link to .*secret', outside of the folder that is shared"):
        push_adapter(adapter, "user/probe")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"repo_id": "probe"}, "repo_id is 'probe', but must be a name on the Hub with its owner's"),
        ({"repo_id": "user/a/b"}, "must be a name on the Hub"),
        ({"repo_id": "user/ä b"}, "must be a name on the Hub"),
        ({"repo_id": None}, "repo_id is None"),
        ({"base_model": "/home/me/vit"}, "base_model is '/home/me/vit'"),
        ({"revision": "new", "pull_request": True}, "a pull request has a branch of its own"),
        ({"folder": "nowhere"}, "There is no folder 'nowhere'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(words, reason, adapter):
    with pytest.raises(ValueError, match=reason):
        push_adapter(**{"folder": adapter, "repo_id": "user/probe", **words})


def test_offline_nothing_is_tried(adapter):
    with pytest.raises(OSError, match="'user/probe' cannot be pushed to: HF_HUB_OFFLINE is set"):
        push_adapter(adapter, "user/probe")
