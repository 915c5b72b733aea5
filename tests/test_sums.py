"""Sums of heads on disk: saved beside the adapter, taken up weeks later, joined, forgotten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from observing_cases import LDA, PROMPTS, WIDE, adapter_logits, batch_of, check_close
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from trainer_cases import images

from peft_cl import (
    LinearProbeConfig,
    RunResults,
    class_incremental,
    join_adapters,
    results_table,
)
from peft_cl.heads.files import SUMS_FILE


# ------------------------------------------------------------------------------------------------ on disk


def test_sums_lie_beside_the_adapter_and_are_counted(make_trainer, tiny_vit, data):
    trainer = make_trainer(LinearProbeConfig(**LDA))
    trainer.train()
    folder = Path(trainer.args.output_dir)
    record = RunResults.load(folder)
    assert record.sums_bytes == (folder / SUMS_FILE).stat().st_size > record.adapter_bytes
    assert f"+ {record.sums_bytes / 1e3:.1f} kB of sums" in results_table([record])
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "sums" in name or "training" in name]  # noqa: SIM118
    expected = adapter_logits(trainer, data["test"])
    (folder / SUMS_FILE).unlink()
    loaded = PeftModel.from_pretrained(tiny_vit(), folder)
    with torch.no_grad():
        found = loaded(batch_of(trainer, data["test"])["pixel_values"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("config", [lambda: LinearProbeConfig(**LDA, **WIDE), lambda: PROMPTS["coda"](head="fusion")])
def test_an_adapter_learns_on_weeks_later(config, make_trainer, tiny_vit, data):
    whole = make_trainer(config(), scenario=class_incremental(data, classes_per_task=[2, 2, 2]), folder="whole")
    whole.train()
    short = {split: part.filter(lambda label: label < 4, input_columns="label") for split, part in data.items()}
    first = make_trainer(config(), scenario=class_incremental(short, classes_per_task=[2, 2]), folder="first")
    first.train()
    model = PeftModel.from_pretrained(tiny_vit(), first.args.output_dir, is_trainable=True)
    rest = {split: part.filter(lambda label: label >= 4, input_columns="label") for split, part in data.items()}
    later = make_trainer(None, model=model, scenario=class_incremental(rest, 1), folder="later")
    later.train()
    assert model.config.id2label == whole.model.config.id2label
    if config().head == "lda":
        torch.testing.assert_close(adapter_logits(later, data["test"]), adapter_logits(whole, data["test"]))
    assert (Path(later.args.output_dir) / SUMS_FILE).is_file()


def test_a_task_may_be_added(make_trainer, data):
    trainer = make_trainer(LinearProbeConfig(**LDA))
    trainer.train()
    trainer.train_task({"train": images(10, 7), "test": images(4, 8)}, name="more")
    assert trainer.finished_tasks == 4 and trainer.tuner.head.active.sums.images == 96 + 60


def saved(make_trainer) -> Path:
    trainer = make_trainer(LinearProbeConfig(**LDA))
    trainer.train()
    return Path(trainer.args.output_dir)


def test_going_on_without_the_sums_is_refused_with_the_remedy(make_trainer, tiny_vit, tmp_path):
    folder = saved(make_trainer)
    shutil.move(folder / SUMS_FILE, tmp_path / SUMS_FILE)
    model = PeftModel.from_pretrained(tiny_vit(), folder, is_trainable=True)
    with pytest.raises(ValueError, match=rf"head 'lda' .*no {SUMS_FILE} beside it in .*load_sums\(folder\)"):
        model.begin_task(["more"])
    assert model.peft_config["default"].num_tasks == 3  # nothing has begun
    model.load_sums(tmp_path)  # the remedy
    model.begin_task(["more"])


def test_sums_of_something_else_are_refused(make_trainer, tiny_vit, tmp_path):
    folder = saved(make_trainer)
    with pytest.raises(ValueError, match="sums.*not this adapter's.*backbone is"):
        PeftModel.from_pretrained(tiny_vit(seed=1), folder, is_trainable=True).begin_task(["more"])
    content = bytearray((folder / SUMS_FILE).read_bytes())
    (folder / SUMS_FILE).write_bytes(content[:-100])
    with pytest.raises(ValueError, match="cannot be read.*Copy the file again"):
        PeftModel.from_pretrained(tiny_vit(), folder, is_trainable=True).begin_task(["more"])
    other = make_trainer(LinearProbeConfig(**LDA), folder="other", num_tasks=2)
    other.train_task(other.scenario[0])
    shutil.copy(Path(other.args.output_dir) / SUMS_FILE, folder / SUMS_FILE)
    with pytest.raises(ValueError, match="not this adapter's: classes is"):
        PeftModel.from_pretrained(tiny_vit(), folder, is_trainable=True).begin_task(["more"])


def test_a_bfloat16_backbone_takes_the_sums_of_float32(make_trainer, tiny_vit):
    folder = saved(make_trainer)
    model = PeftModel.from_pretrained(tiny_vit().to(torch.bfloat16), folder, is_trainable=True)
    model.begin_task(["more"])
    assert model.head.active.sums.images == 96


# ------------------------------------------------------------------------------------------------ without it


def test_a_loop_of_ones_own(make_trainer, tiny_vit, data):
    expected = make_trainer(LinearProbeConfig(**LDA))
    expected.train()
    model = get_peft_model(tiny_vit(), LinearProbeConfig(**LDA))
    for task in expected.scenario:
        model.begin_task(task.classes)
        model.fit_head(expected.plain_batches(task, batch_size=5))
    batch = batch_of(expected, data["test"])["pixel_values"]
    with torch.no_grad():
        found = model.eval()(batch).logits
    check_close(found, adapter_logits(expected, data["test"]))


def test_halves_learnt_apart_join(make_trainer, tiny_vit, data, tmp_path):
    whole = make_trainer(LinearProbeConfig(**LDA), num_tasks=2, folder="whole")
    whole.train()
    folders = {}
    for name, keep in (("low", range(3)), ("high", range(2, 6))):  # one class in both
        rows = {
            split: part.filter(lambda label, keep=keep: label in keep, input_columns="label")
            for split, part in data.items()
        }
        if name == "high":  # of the class in both, other images
            rows["train"] = rows["train"].filter(lambda label: label > 2, input_columns="label")
        trainer = make_trainer(LinearProbeConfig(**LDA), scenario=class_incremental(rows, 1), folder=name)
        trainer.train()
        folders[name] = trainer.args.output_dir
    model = PeftModel.from_pretrained(tiny_vit(), folders["low"], "low")
    model.load_adapter(folders["high"], "high")
    join_adapters(model, ["low", "high"], "both")
    model.set_adapter("both")
    assert model.config.id2label == whole.model.config.id2label
    with torch.no_grad():
        found = model.eval()(batch_of(whole, data["test"])["pixel_values"]).logits
    check_close(found, adapter_logits(whole, data["test"]))
    assert model.peft_config["both"].num_tasks == 2


def test_forgetting_says_what_it_cannot_do(make_trainer):
    trainer = make_trainer(PROMPTS["coda"](head="ncm"))
    trainer.train()
    model = trainer.model
    with pytest.raises(ValueError, match="'lion'.* are no classes that this adapter has learnt"):
        model.forget_classes(["lion"])
    with pytest.warns(UserWarning, match="red: their rows and sums are gone, but prompts"):
        model.forget_classes("red")
    assert list(model.config.id2label.values()) == ["green", "blue", "yellow", "cyan", "magenta"]
    assert model.peft_config["default"].tasks == [[0], [1, 2], [3, 4]]
    with pytest.raises(ValueError, match="All classes would be forgotten"):
        model.forget_classes(list(model.config.id2label.values()))


def test_several_adapters_have_heads_of_their_own(make_trainer, tiny_vit, data):
    folder = saved(make_trainer)
    model = PeftModel.from_pretrained(tiny_vit(), folder, is_trainable=True)
    model.add_adapter("ridge", LinearProbeConfig(head="ridge", **WIDE))
    batch = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model.eval()(batch).logits
        model.set_adapter("ridge")
        model.begin_task(["a", "b"])
        model.fit_head([{"pixel_values": batch, "labels": torch.tensor([0, 1, 0, 1])}])
        assert model.eval()(batch).logits.argmax(-1).tolist() == [0, 1, 0, 1]
        model.set_adapter("default")
        torch.testing.assert_close(model(batch).logits, before, rtol=0, atol=0)
        with model.disable_adapter():
            assert torch.equal(model(batch).logits, tiny_vit()(batch).logits)
