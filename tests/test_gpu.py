"""What holds on a CUDA GPU: the numbers of the CPU, no waiting in a step, number formats, graphs, interruption."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import CONFIGS
from transformers import TrainerCallback
from tuner_cases import CASES, gradients, images, labels, prompted, tiny

from peft_cl import RandomResizedCropFlip


pytestmark = pytest.mark.gpu
every_case = pytest.mark.parametrize("name", CASES)
every_method = pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda"])


@pytest.fixture(autouse=True)
def exact_products():
    """float32 means float32: convolutions are TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def step_of(model, pixels: torch.Tensor, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluation logits and training loss; gradients stay in place."""
    with torch.no_grad():
        logits = model.eval()(pixels).logits
    model.train().zero_grad()
    output = model(pixel_values=pixels, labels=labels(model).to(pixels.device), **more)
    output.loss.backward()
    return logits, output.loss.detach()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_case
def test_the_numbers_are_those_of_the_cpu(name, attention):
    model = prompted(name, tiny(attn_implementation=attention))
    other = copy.deepcopy(model).cuda()
    expected, found = step_of(model, images()), step_of(other, images().cuda())
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two.cpu(), one, rtol=1e-4, atol=1e-4)
    theirs = gradients(model)
    for part, gradient in gradients(other).items():
        if gradient is not None:
            scale = theirs[part].abs().max().clamp_min(1e-3)
            torch.testing.assert_close(gradient.cpu() / scale, theirs[part] / scale, rtol=1e-3, atol=1e-3)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_leaving_work_out_changes_no_number(name, dtype, monkeypatch):
    model = prompted(name, tiny().to(dtype)).cuda()
    whole = copy.deepcopy(model)
    whole.base_model.encoder.reads_last_layer = False
    monkeypatch.setattr(whole.base_model.encoder, "_is_fixed", lambda *arguments: False)
    assert model.base_model.encoder.reads_last_layer
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for one, two in zip(step_of(model, images().cuda()), step_of(whole, images().cuda()), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@every_case
def test_a_step_never_waits_for_the_device(name):
    """Neither in training nor in evaluation: the next batch is prepared while the GPU computes."""
    model, pixels = prompted(name).cuda(), images().cuda()
    rows = labels(model).cuda()
    query = model.query(pixels)
    step_of(model, pixels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for more in ({}, {"query": query}):
            model.train().zero_grad()
            model(pixel_values=pixels, labels=rows, **more).loss.backward()
            with torch.no_grad():
                model.eval()(pixels, **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.flash
@every_case
def test_flash_attention_takes_prefixes(name):
    """A prefix is more keys than queries, without a mask."""
    base = tiny(hidden_size=64, attn_implementation="flash_attention_2").half()
    model = prompted(name, base).cuda()
    other = prompted(name, tiny(hidden_size=64, attn_implementation="eager").half()).cuda()
    for one, two in zip(step_of(model, images().cuda()), step_of(other, images().cuda()), strict=True):
        torch.testing.assert_close(one, two, rtol=5e-2, atol=5e-2)


@every_case
def test_prefixes_go_through_a_fused_kernel(name):
    """sdpa must not fall back to separate products without a word."""
    model = prompted(name, tiny(attn_implementation="sdpa", hidden_size=64).to(torch.bfloat16)).cuda()
    with torch.profiler.profile() as profile:
        step_of(model, images().cuda())
    calls = {event.key: event.count for event in profile.key_averages()}
    fused = sum(
        calls.get(f"aten::_scaled_dot_product_{kind}_attention", 0) for kind in ("flash", "efficient", "cudnn")
    )
    assert fused == calls["aten::scaled_dot_product_attention"] > 0
    assert "aten::_scaled_dot_product_attention_math" not in calls


@pytest.mark.slow
@every_method
def test_compiled_layers_give_the_same(method, make_trainer):
    matrices = []
    for options in ({}, {"torch_compile": True}):
        torch._dynamo.reset()
        trainer = make_trainer(CONFIGS[method](), folder=f"run {options}", use_cpu=False, **options)
        trainer.train()
        matrices.append(trainer.accuracy_matrix)
    np.testing.assert_allclose(*matrices, atol=0.05)
    assert torch.backends.cuda.matmul.allow_tf32 is False


@every_method
@pytest.mark.parametrize("options", [{"fp16": True}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_mixed_precision_learns(method, options, make_trainer):
    """With fp16 the loss is scaled, and the logits of other tasks' classes are -inf."""
    trainer = make_trainer(CONFIGS[method](), num_tasks=2, use_cpu=False, num_train_epochs=4, **options)
    trainer.train()
    assert trainer.metrics["average_accuracy"] > 0.5
    assert all(np.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    assert (trainer.accelerator.scaler is not None) == ("fp16" in options)
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


class Interrupt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        self.step -= 1
        if self.step == 0:
            raise KeyboardInterrupt


@every_method
@pytest.mark.parametrize("options", [{}, {"fp16": True}], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(method, options, make_trainer):
    """`full_determinism`, because kernels of attention sum in an order of their own; within the second task."""
    common = {"use_cpu": False, "full_determinism": True, "save_strategy": "steps", "save_steps": 2, **options}
    common["augmentation"] = RandomResizedCropFlip(size=32)
    make_trainer(CONFIGS[method](), folder="whole", **common).train()
    interrupted = make_trainer(CONFIGS[method](), folder="resumed", callbacks=[Interrupt(11)], **common)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = make_trainer(CONFIGS[method](), folder="resumed", **common)
    resumed.train(resume_from_checkpoint=True)
    whole = resumed.folder.with_name("whole")
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed.folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert resumed.finished_tasks == 3


@pytest.mark.parametrize("method", ["coda", "l2p"])
def test_cached_queries_and_images_change_nothing(method, make_trainer, tmp_path):
    """Queries in files and images kept as bytes, which become pixels on the device."""
    matrices = []
    caches = {"image_cache_dir": str(tmp_path / "images"), "query_cache_dir": str(tmp_path / "queries")}
    for folder, options in (("none", {"cache_queries": False}), ("memory", {}), ("files", caches), ("again", caches)):
        trainer = make_trainer(CONFIGS[method](), folder=folder, use_cpu=False, full_determinism=True, **options)
        trainer.train()
        matrices.append(trainer.accuracy_matrix)
    for matrix in matrices[1:]:
        np.testing.assert_allclose(matrix, matrices[0], atol=0.05)


def test_bytes_become_the_processors_pixels_on_the_device(make_trainer):
    trainer = make_trainer(CONFIGS["coda"](), use_cpu=False)
    transform = trainer._transforms[False]
    pictures = [example["image"] for example in trainer.scenario[0].train]
    pixels = transform.from_bytes(transform.to_bytes(pictures).cuda())
    assert pixels.is_cuda and torch.equal(pixels.cpu(), transform(pictures))
