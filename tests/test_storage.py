"""Prompts in 16 bits: half the file, float32 in use, and the same numbers whichever way a run goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_cases import CONFIGS, whole_and_resumed
from transformers import AutoModelForImageClassification, TrainerCallback
from tuner_cases import CASES, config, images, labels, logits, prompted, step, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, RunResults, class_incremental
from peft_cl.trainer.snapshot import load_snapshot
from peft_cl.tuners.base.storage import NAMES


WITH_PROMPTS = [name for name in CASES if name != "linear-probe"]
FORMATS = ["bfloat16", "float16"]
WEIGHTS = "adapter_model.safetensors"


def by_hand(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """float32 numbers rounded to the format, without torch's own cast."""
    numbers = values.detach().numpy()
    if dtype == "float16":
        return torch.from_numpy(numbers.astype(np.float16).astype(np.float32))
    bits = numbers.view(np.uint32).astype(np.uint64)  # round to nearest, ties to even, and cut the lower 16 bits
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def own(model) -> dict[str, torch.Tensor]:
    """The pool's and the head's tensors, by their names there."""
    return {
        name.partition(".default.")[0].rpartition("_")[2] + "." + name.partition(".default.")[2]: value
        for name, value in model.state_dict().items()
        if ".default." in name
    }


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_a_file_has_prompts_in_16_bits_and_all_else_in_float32(name, dtype, tmp_path):
    model = prompted(name, tasks=3, storage_dtype=dtype)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / WEIGHTS)
    for key, value in file.items():
        is_prompt = key.rpartition(".")[2] in NAMES and "_pool." in key
        assert value.dtype == (getattr(torch, dtype) if is_prompt else torch.float32), key
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert facts["storage_dtype"] == dtype and facts["format_version"] == 3

    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    found, before = own(loaded), own(model)
    assert found.keys() == before.keys()
    for key, value in before.items():
        expected = by_hand(value.float(), dtype) if key.rpartition(".")[2] in NAMES else value
        assert torch.equal(found[key].float(), expected), key
        assert found[key].dtype == value.dtype
    assert all(parameter.dtype == torch.float32 for parameter in loaded.base_model.pool.parameters())
    # It answers as a model does whose prompts are these numbers.
    with torch.no_grad():
        for key, value in model.base_model.pool.named_parameters():
            value.copy_(by_hand(value, dtype) if key in NAMES else value)
    assert torch.equal(logits(loaded), logits(model))


def test_float32_is_as_ever(tmp_path):
    """No setting is written that earlier versions would not know."""
    prompted("coda").save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert facts["storage_dtype"] == "float32" and facts["format_version"] < 3
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_rows_of_past_tasks_take_half_the_memory():
    sizes = {}
    for dtype in ("float32", *FORMATS):
        pool = prompted("coda", tasks=4, storage_dtype=dtype).base_model.pool
        assert pool.past_prompts.dtype == getattr(torch, dtype) and pool.prompts.dtype == torch.float32
        assert pool.past_keys.dtype == torch.float32  # which decide by small differences
        sizes[dtype] = pool.past_prompts.nelement() * pool.past_prompts.element_size()
    assert sizes["bfloat16"] == sizes["float16"] == sizes["float32"] / 2


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda-paper"])
def test_every_way_of_loading_gives_the_same(name, tmp_path):
    model = prompted(name, tasks=2, storage_dtype="bfloat16")
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(tiny(), tmp_path / "adapter"))
    lean = PeftModel.from_pretrained(tiny(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), expected)
    assert {value.dtype for value in lean.base_model.pool.parameters()} == {torch.float32}
    bare = tiny()  # transformers' own
    bare.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(bare), expected)
    tiny().save_pretrained(tmp_path / "base")
    whole = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    whole.load_adapter(str(tmp_path / "adapter"), adapter_name="other")
    assert torch.equal(logits(whole.eval()), expected)
    lean.save_pretrained(tmp_path / "again")  # what was rounded stays as it is
    first, again = (load_file(tmp_path / folder / WEIGHTS) for folder in ("adapter", "again"))
    assert all(torch.equal(value, again[key]) for key, value in first.items())


# ------------------------------------------------------------------------------------------------ computing


def test_computing_is_in_float32():
    """CODA-Prompt's prompt is the weighted sum of past and current components, past ones as they are stored."""
    model = prompted("coda", tasks=3, storage_dtype="bfloat16")
    pool = model.base_model.pool
    query = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    similarity, prompts = pool.weigh(query)
    assert prompts.dtype == torch.float32
    components = torch.cat([pool.past_prompts.double(), pool.prompts.double()], dim=1)
    expected = torch.einsum("lbk,lkrd->lbrd", similarity.double(), components)
    torch.testing.assert_close(prompts, expected.float(), atol=1e-5, rtol=1e-5)


def test_small_steps_are_not_lost_in_training():
    """A step smaller than what bfloat16 can tell moves a prompt all the same, until the task ends."""
    model = prompted("coda", tasks=1, storage_dtype="bfloat16")
    pool = model.base_model.pool
    before = pool.prompts.detach().clone()
    step(model)
    assert pool.prompts.grad.dtype == torch.float32
    with torch.no_grad():
        pool.prompts.mul_(1 + 1e-5)
    assert not torch.equal(pool.prompts, before)
    model.begin_task(["one more"])
    assert torch.equal(pool.past_prompts.float(), by_hand(before * (1 + 1e-5), "bfloat16"))


def test_orthogonality_is_of_the_rows_that_are_kept(tmp_path):
    """Summed task by task as rows are kept, or at once from a file: the same, and as a plain sum over pairs."""
    words = {"orthogonality": "pairwise", "orthogonality_coefficient": 1.0, "storage_dtype": "bfloat16"}
    model = prompted("coda", tasks=1, **words)
    for task in range(1, 4):
        step(model)  # from now on sums of past rows are kept
        model.begin_task([f"class {task} {index}" for index in range(2)])
    pool = model.base_model.pool
    with torch.no_grad():
        pool.prompts.copy_(by_hand(pool.prompts, "bfloat16"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    found = []
    for each in (model, loaded):
        each.train()
        each(pixel_values=images(), labels=labels(each))
        found.append(each.base_model.head.last_losses["orthogonality"].item())
    assert found[0] == found[1]
    rows = torch.cat([pool.past_prompts.double(), pool.prompts.detach().double()], dim=1).flatten(2)
    cosines = torch.cosine_similarity(rows[:, :, None], rows[:, None], dim=-1).abs()
    pairs = cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()
    assert found[0] == pytest.approx((pairs / len(rows)).item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ runs


RUNS = {
    "l2p": lambda **words: L2PConfig(pool_size=6, prompt_length=2, top_k=2, **words),
    "dualprompt": lambda **words: DualPromptConfig(prompt_length=2, g_prompt_length=2, **words),
    "coda": lambda **words: CodaPromptConfig(
        components_per_task=2, prompt_length=4, orthogonality_coefficient=0.1, **words
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_measured_is_what_is_saved(name, make_trainer, tiny_vit, data):
    trainer = make_trainer(RUNS[name](storage_dtype="float16"), num_train_epochs=1, num_tasks=2)
    trainer.train()
    pixels = trainer._collators[False](list(data["test"]))["pixel_values"]
    loaded = PeftModel.from_pretrained(tiny_vit(), trainer.folder)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels).logits, trainer.model.eval()(pixels).logits)
    record = RunResults.load(trainer.folder)
    assert record.hyperparameters["adapter"]["storage_dtype"] == "float16"
    assert record.adapter_bytes == (trainer.folder / WEIGHTS).stat().st_size


def same_states(*trainers) -> bool:
    first, second = (load_snapshot(each.folder / "_state")["weights"] for each in trainers)
    return first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(value, second[key]) for key, value in first.items()
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_to_the_bit(name, make_trainer):
    make = lambda **words: make_trainer(RUNS[name](storage_dtype="bfloat16"), num_train_epochs=1, **words)  # noqa: E731
    whole, again = whole_and_resumed(make)
    assert same_states(whole, again)
    np.testing.assert_array_equal(whole.accuracy_matrix, again.accuracy_matrix)


def test_a_task_that_is_resumed_goes_on_in_float32(make_trainer):
    """From a checkpoint in the middle of a task, whose prompts were not rounded."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if self.trainer.task.index == 1 and state.global_step == 3:
                raise KeyboardInterrupt

    words = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1, "num_tasks": 2}
    whole = make_trainer(RUNS["coda"](storage_dtype="bfloat16"), folder="whole", **words)
    whole.train()
    stop = Stop()
    part = make_trainer(RUNS["coda"](storage_dtype="bfloat16"), callbacks=[stop], **words)
    stop.trainer = part
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = make_trainer(RUNS["coda"](storage_dtype="bfloat16"), **words)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and same_states(whole, again)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_the_file_as_from_memory(name, make_trainer, tiny_vit, data):
    first = class_incremental(data, 2, class_order=["red", "green", "blue", "yellow"])
    then = class_incremental(data, 1, class_order=["cyan", "magenta"])
    trainer = make_trainer(RUNS[name](storage_dtype="bfloat16"), scenario=first, num_train_epochs=1)
    trainer.train()
    loaded = PeftModel.from_pretrained(tiny_vit(), trainer.folder, is_trainable=True)
    found = []
    for model in (trainer.model, loaded):
        make_trainer(None, model=model, scenario=then, num_train_epochs=1, folder=f"on {len(found)}").train()
        found.append(own(model))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items() if "training_head" not in key)


def test_another_format_is_another_run(make_trainer):
    first = make_trainer(RUNS["coda"](storage_dtype="bfloat16"), max_steps=1)
    first.train_task(first.scenario[0])
    with pytest.raises(ValueError, match="adapter.storage_dtype: was 'bfloat16', is 'float16'"):
        make_trainer(RUNS["coda"](storage_dtype="float16"), max_steps=1).train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------------------ bad input


def test_values_that_float16_has_no_room_for(tmp_path, make_trainer):
    """Told when they are saved and when a task ends; bfloat16 has the room, as the message says."""
    said = (
        "prompts has values up to 7e\\+04, but storage_dtype is 'float16', which ends at 65,504. Set storage_dtype='b"
    )
    for dtype in FORMATS:
        model = prompted("l2p", tasks=1, storage_dtype=dtype)
        with torch.no_grad():
            model.base_model.pool.prompts[0, 0, 0, 0] = 70000.0
        if dtype == "bfloat16":
            model.save_pretrained(tmp_path / dtype)
            kept = PeftModel.from_pretrained(tiny(), tmp_path / dtype).base_model.pool.prompts
            assert kept[0, 0, 0, 0].item() == pytest.approx(70000, rel=2**-8)
            continue
        with pytest.raises(ValueError, match=said):
            model.save_pretrained(tmp_path / dtype)

    class Diverge(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.base_model.pool.prompts[0, 0, 0, 0] = 70000.0

    trainer = make_trainer(RUNS["l2p"](storage_dtype="float16"), callbacks=[Diverge()], max_steps=1)
    with pytest.raises(ValueError, match=said):
        trainer.train()


def test_a_format_that_there_is_none_of():
    with pytest.raises(
        ValueError, match="storage_dtype is 'int8', but must be one of 'float32', 'bfloat16', 'float16'"
    ):
        CodaPromptConfig(storage_dtype="int8")
    assert config("linear-probe", storage_dtype="float16").storage_dtype == "float16"  # without prompts to store
    get_peft_model(tiny(), CONFIGS["linear-probe"]())
