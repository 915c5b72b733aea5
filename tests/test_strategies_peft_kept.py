"""PEFT's own methods on the task sequence: loaded by stock loaders, resumed, learnt on with, on two processes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft_cases import ALL, LORA, PIXELS, backbone_of, config_of, logits, made
from safetensors.torch import load_file
from test_processes import check_same
from test_processes import run as run_processes
from trainer_cases import images
from transformers import (
    AutoModelForImageClassification,
    TrainerCallback,
)

from peft_cl import class_incremental
from peft_cl.commands.train import clear
from peft_cl.strategies.lora import FirstSessionLoRA, SequentialLoRA
from peft_cl.strategies.osf import OSF
from peft_cl.tuners.base.merged import merged, parameters_of_others


# ------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("name", ALL)
def test_the_stock_loaders_bring_the_model_back(name, tiny_vit, make_trainer):
    trainer = made(make_trainer, name, num_tasks=2)
    trainer.train()
    expected, run = logits(trainer.model), trainer.folder
    assert str(run) not in (run / "adapter_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "trained on other weights", "missing adapter keys"
        base = AutoModelForImageClassification.from_pretrained(run / "backbone")
        ways = [PeftModel.from_pretrained(base, run), AutoPeftModel.from_pretrained(run)]
        if name in LORA:
            alone = PeftModel.from_pretrained(tiny_vit(), run / "lora").merge_and_unload()
            ways.append(PeftModel.from_pretrained(alone, run))
    ways.append(AutoModelForImageClassification.from_pretrained(run))
    for loaded in ways:
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    weights = {part for part in load_file(run / "adapter_model.safetensors") if "head" not in part}
    assert not weights  # LoRA lies apart


def test_lora_alone_is_an_adapter_of_peft(tiny_vit, make_trainer):
    trainer = made(make_trainer, "sequential", num_tasks=2, settings={"target_modules": "all-linear", "r": 3})
    trainer.train()
    loaded = PeftModel.from_pretrained(tiny_vit(), trainer.folder / "lora")
    config = loaded.peft_config["default"]
    assert isinstance(config, LoraConfig) and (config.r, config.lora_alpha) == (3, 16)
    layers = [part for part in loaded.modules() if isinstance(part, LoraLayer)]
    assert len(layers) == 6 * 6
    own = load_file(trainer.folder / "lora" / "adapter_model.safetensors")
    assert trainer.results.adapter_bytes == (trainer.folder / "adapter_model.safetensors").stat().st_size + sum(
        4 * value.numel() for value in own.values()
    )
    features = loaded.base_model.model.vit(PIXELS).last_hidden_state
    expected = merged(backbone_of(trainer.model))(PIXELS).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    clear(trainer.folder)
    assert not (trainer.folder / "lora").exists() and not (trainer.folder / "backbone").exists()


def test_osf_counts_the_whole_backbone(make_trainer):
    trainer = made(make_trainer, "osf", num_tasks=2)
    trainer.train()
    weights = load_file(trainer.folder / "backbone" / "model.safetensors")
    size = sum(4 * value.numel() for part, value in weights.items() if part.startswith("vit."))
    assert trainer.results.adapter_bytes == size + (trainer.folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "settings"), [("osf", {"target_modules": ["q_proj", "v_proj"]}), ("sequential", {}), ("first", {})]
)
def test_the_record_tells_the_backbones_own_weights(name, settings, make_trainer, tiny_vit):
    """Of OSF a few are trained, and LoRA's are not the backbone's own, also when they are frozen."""
    trainer = made(make_trainer, name, settings=settings, num_tasks=2)
    trainer.train()
    own = [value.numel() for value in tiny_vit().vit.parameters()]
    found = trainer.results.backbone
    assert found["parameters"] == sum(own) and found["saved_bytes"] == (4 * sum(own) if name == "osf" else 0)
    assert (found["trained"] > 0) == (name != "first")


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        pytest.param("sequential", 1, marks=pytest.mark.slow),
        pytest.param("first", 1, marks=pytest.mark.slow),
        ("first+lda", 0),
        ("osf", 1),
    ],
)
def test_an_interrupted_run_ends_as_if_nothing_had_happened(name, cut, make_trainer, tiny_vit):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if trainer.task.index == cut and state.global_step == 2:
                raise KeyboardInterrupt

    whole = made(make_trainer, name, folder="whole", num_tasks=2)
    whole.train()
    for folder, words in {"between": {}, "within": {"save_strategy": "steps", "save_steps": 1}}.items():
        trainer = made(make_trainer, name, callbacks=[Stop()] if words else [], folder=folder, num_tasks=2, **words)
        if words:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train_task(trainer.scenario[0])
        model, strategy = get_peft_model(tiny_vit(), config_of(name)), ALL[name][0]()
        again = make_trainer(None, model=model, strategy=strategy, folder=folder, num_tasks=2, max_steps=3, **words)
        if name in LORA:  # LoRA begins with other numbers in each process
            torch.nn.init.normal_(parameters_of_others(backbone_of(model))[0])
        again.train(resume_from_checkpoint=True)
        expected = whole.model.state_dict()
        assert again.model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[part]) for part, value in again.model.state_dict().items())
        np.testing.assert_array_equal(again.accuracy_matrix, whole.accuracy_matrix)
        assert again.model.get_nb_trainable_parameters() == whole.model.get_nb_trainable_parameters()


@pytest.mark.parametrize("name", ALL)
def test_a_finished_run_that_is_resumed_stays_as_it_is(name, make_trainer):
    whole = made(make_trainer, name, num_tasks=2)
    whole.train()
    again = made(make_trainer, name, num_tasks=2)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(logits(again.model), logits(whole.model))
    assert again.model.get_nb_trainable_parameters() == whole.model.get_nb_trainable_parameters()


def test_a_strategy_begins_anew_with_a_new_run(make_trainer):
    for kind in (FirstSessionLoRA, OSF):
        strategy, found = kind(), []
        for folder in ("first", "second"):
            folder = f"{kind.__name__} {folder}"
            trainer = make_trainer(config_of("first"), strategy=strategy, folder=folder, num_tasks=2, max_steps=3)
            trainer.train()
            found.append(merged(backbone_of(trainer.model)).state_dict())
        assert all(torch.equal(value, found[0][part]) for part, value in found[1].items())


def test_a_saved_adapter_learns_on(make_trainer, data):
    """From the merged backbone: with a new LoRA, or, after a first session, without a strategy."""
    more = class_incremental({split: images(4, seed) for seed, split in enumerate(data)}, num_tasks=1)
    for name, strategy in (("sequential", SequentialLoRA()), ("first+lda", None)):
        first = made(make_trainer, name, folder=name, num_tasks=2)
        first.train()
        base = AutoModelForImageClassification.from_pretrained(first.folder / "backbone")
        model = PeftModel.from_pretrained(base, first.folder, is_trainable=True)
        if strategy is None:
            message = (
                "has learnt 2 tasks, but First-session LoRA learns in the first one alone. Leave the strategy out"
            )
            with pytest.raises(ValueError, match=message):
                make_trainer(None, model=model, strategy=FirstSessionLoRA(), scenario=more)
        words = {"scenario": more, "folder": f"{name} more", "num_train_epochs": 1}
        again = make_trainer(None, model=model, strategy=strategy, **words)
        again.train()
        assert again.results.finished_tasks == 3
        folder = again.folder / "backbone" if strategy else first.folder / "backbone"
        loaded = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(folder), again.folder)
        torch.testing.assert_close(logits(loaded), logits(again.model), rtol=1e-4, atol=1e-4)


def test_a_model_in_memory_learns_on_with_the_lora_that_it_has(make_trainer, data):
    first = made(make_trainer, "sequential", num_tasks=2)
    first.train()
    before = [value.clone() for value in parameters_of_others(backbone_of(first.model))]
    words = {"model": first.model, "scenario": class_incremental(data, num_tasks=1), "folder": "more"}
    with pytest.raises(ValueError, match=r"has 12 layers of Linear in it, which are not those .* r=4.*Load it anew"):
        make_trainer(None, strategy=SequentialLoRA(4), **words)
    again = make_trainer(None, strategy=SequentialLoRA(), **words)
    same = zip(before, parameters_of_others(backbone_of(again.model)), strict=True)
    assert all(torch.equal(*pair) for pair in same)
    with pytest.raises(
        ValueError, match="has 12 layers of Linear in it, but OSF decomposes its weights. Load it anew"
    ):
        make_trainer(None, strategy=OSF(), **words)


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
@pytest.mark.parametrize("method", ["probe+lora+uneven", "probe+firstlora+lda+uneven", "probe+osf"])
def test_two_processes_learn_what_one_learns(method, tmp_path):
    for processes, folder in ((1, "one"), (2, "two")):
        run_processes(processes, tmp_path / folder, method, PLAIN="1", EVALUATE_FIRST="1")
    check_same(tmp_path / "two", tmp_path / "one", 1e-4, 1e-3)
    one, two = (load_file(tmp_path / folder / "backbone" / "model.safetensors") for folder in ("one", "two"))
    for part, value in one.items():
        torch.testing.assert_close(two[part], value, rtol=1e-3, atol=1e-4)
