"""What PEFT can do, tried with each of our methods: prints a Markdown table, yes or no with the reason.

    python benchmarks/capabilities.py                    # all, the exports included: some minutes
    python benchmarks/capabilities.py --cheap            # a minute
    python benchmarks/capabilities.py --page docs/serving.md    # writes the table into the page

Each try is a function that ends well, or with the error that a user would see. An error of another kind than
`ValueError`, `NotImplementedError` and `TypeError`, or a result that is not right, ends the script.
"""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig, export_adapter


METHODS = {
    "L2P": lambda: L2PConfig(pool_size=6, prompt_length=3, top_k=2),
    "DualPrompt": lambda: DualPromptConfig(pool_size=5, prompt_length=3, g_layers=[0], layers=[1, 2]),
    "CODA-Prompt": lambda: CodaPromptConfig(components_per_task=2, prompt_length=4, layers=[0, 2]),
    "linear probe": LinearProbeConfig,
}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
#: Marks between which the table stands in a page.
BEGIN, END = "<!-- capabilities: begin -->", "<!-- capabilities: end -->"


def base() -> ViTForImageClassification:
    """The same random backbone each time."""
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 3, "num_labels": 4}
    config = ViTConfig(hidden_size=24, num_attention_heads=2, intermediate_size=48, **size)
    return ViTForImageClassification(config).eval()


def adapted(method: str, backbone: torch.nn.Module | None = None) -> PeftModel:
    """An adapter with two tasks, its weights moved by noise, in evaluation mode."""
    model = get_peft_model(base() if backbone is None else backbone, METHODS[method]())
    torch.manual_seed(1)
    for names in (["a", "b"], ["c", "d", "e"]):
        model.begin_task(names)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def second(method: str) -> PeftModel:
    """A model with two adapters, of which the first is active."""
    model = adapted(method)
    model.add_adapter("other", METHODS[method]())
    model.set_adapter("other")
    model.begin_task(["x", "y"])
    model.set_adapter("default")
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, images: torch.Tensor = IMAGES, **words) -> torch.Tensor:
    return model(images, **words).logits


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def saved(method: str, folder: str) -> torch.Tensor:
    model = adapted(method)
    model.save_pretrained(folder)
    return logits(model)


# ----------------------------------------------------------------------------------------------- the tries


def save_and_load(method: str, **words) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = saved(method, folder)
        same(logits(PeftModel.from_pretrained(base(), folder, adapter_name="renamed", **words)), expected)


def load_without_copy(method: str) -> None:
    save_and_load(method, low_cpu_mem_usage=True)


def load_by_transformers(method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = saved(method, folder)
        model = base()
        model.load_adapter(folder)
        same(logits(model), expected)


def inject(method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = saved(method, folder)
        config = type(METHODS[method]()).from_pretrained(folder)
        model = inject_adapter_in_model(config, base())
        set_peft_model_state_dict(model, load_peft_weights(folder))
        same(logits(model.eval()), expected)


def several_adapters(method: str) -> None:
    model = second(method)
    first = logits(model)
    model.set_adapter("other")
    assert logits(model).shape == (4, 2)
    model.set_adapter("default")
    same(logits(model), first)


def delete(method: str) -> None:
    model = second(method)
    expected = logits(model)
    model.delete_adapter("other")
    same(logits(model), expected)
    assert not any(".other." in key for key in model.state_dict())


def disable(method: str) -> None:
    model = adapted(method)
    with model.disable_adapter():
        same(logits(model), logits(base()))


def unload(method: str) -> None:
    same(logits(adapted(method).unload()), logits(base()))


def mixed_batch(method: str) -> None:
    model = second(method)
    names = ["other", "default", "__base__", "default"]
    answer, classes = logits(model, adapter_names=names), model.base_model.mixed_classes(names)
    assert classes == [*"abcde", "x", "y", *(f"LABEL_{row}" for row in range(4))]
    same(answer[1::2, :5], logits(model, IMAGES[1::2]), 1e-5)
    same(answer[2, 7:], logits(base(), IMAGES[2:3])[0], 1e-5)


def hot_swap(method: str) -> None:
    model = adapted(method)
    with tempfile.TemporaryDirectory() as folder:
        saved(method, folder)
        hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")


def merge(method: str) -> None:
    adapted(method).merge_and_unload()


def weighted_adapters(method: str) -> None:
    second(method).add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def two_active(method: str) -> None:
    second(method).base_model.set_adapter(["default", "other"])


def mixed_model(method: str) -> None:
    get_peft_model(base(), METHODS[method](), mixed=True)


def on_top_of_lora(method: str) -> None:
    """LoRA in the backbone, merged, then prompts: what one wants in place of two methods in one model."""
    backbone = get_peft_model(base(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    merged = backbone.eval().merge_and_unload()
    expected = logits(merged)
    with (model := adapted(method, merged)).disable_adapter():
        same(logits(model), expected)


def modules_to_save(method: str) -> None:
    type(METHODS[method]())(modules_to_save=["layernorm"])


def lora_conversion(method: str) -> None:
    convert_to_lora(adapted(method), rank=2)


def train(model: PeftModel) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    loss = model(IMAGES.to(next(model.get_base_model().parameters()).dtype), labels=torch.tensor([2, 3, 4, 2])).loss
    loss.backward()
    assert loss.isfinite()
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


def gradient_checkpointing(method: str) -> None:
    expected, model = train(adapted(method)), adapted(method)
    model.get_base_model().gradient_checkpointing_enable()
    found = train(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same(found[key], value, 1e-5)


def half_precision(method: str) -> None:
    model = adapted(method, base().bfloat16())
    gradients = train(model)
    assert gradients and {value.dtype for value in gradients.values()} == {torch.float32}
    assert logits(model.eval(), IMAGES.bfloat16()).isfinite().all()


def status(method: str) -> None:
    model = adapted(method)
    assert get_model_status(model).active_adapters == ["default"] and get_layer_status(model)
    with redirect_stdout(io.StringIO()) as said:
        model.print_trainable_parameters()
    assert f"{model.get_nb_trainable_parameters()[0]:,}" in said.getvalue()


def copies(method: str) -> None:
    model = adapted(method)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(logits(twin), logits(model))


def compiled(method: str) -> None:
    """The whole model, in one graph without a break, and not anew for each size of a batch."""
    model = adapted(method)
    expected = {count: logits(model, IMAGES[:count]) for count in (4, 1, 3, 2)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.get_base_model().compile(backend="aot_eager", fullgraph=True)
    for count in (4, 1, 3, 2, 4, 3):
        same(logits(model, IMAGES[:count]), expected[count], 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def exported(method: str, ending: str = "pt2") -> None:
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    with tempfile.TemporaryDirectory() as folder:
        export_adapter(adapted(method), processor, f"{folder}/model.{ending}")  # which compares the logits


def exported_to_onnx(method: str) -> None:
    exported(method, "onnx")


#: What is tried -> how it is called, and how; those that take longer stand in `SLOW`.
CAPABILITIES: dict[str, Callable[[str], None]] = {
    "save, load under another name: same logits to the bit": save_and_load,
    "`low_cpu_mem_usage=True`": load_without_copy,
    "transformers' own `model.load_adapter(folder)`": load_by_transformers,
    "`inject_adapter_in_model`, `set_peft_model_state_dict`": inject,
    "several adapters, `set_adapter`": several_adapters,
    "`delete_adapter`": delete,
    "`disable_adapter()`: the base model to the bit": disable,
    "`unload()`": unload,
    "several adapters in one batch, `adapter_names`": mixed_batch,
    "several adapters active at once": two_active,
    "`add_weighted_adapter`": weighted_adapters,
    "`hotswap_adapter`": hot_swap,
    "`merge_and_unload`, `merge_adapter`": merge,
    "methods mixed in one model, `PeftMixedModel`": mixed_model,
    "on a backbone with merged LoRA": on_top_of_lora,
    "`modules_to_save`": modules_to_save,
    "`convert_to_lora`": lora_conversion,
    "gradient checkpointing": gradient_checkpointing,
    "bfloat16 backbone, float32 prompts": half_precision,
    "`get_model_status`, `get_layer_status`, `print_trainable_parameters`": status,
    "deepcopy and pickle": copies,
}
SLOW: dict[str, Callable[[str], None]] = {
    "`torch.compile` of the whole model, any batch size": compiled,
    "`torch.export` (.pt2), any batch size": exported,
    "ONNX, any batch size": exported_to_onnx,
}


def tried(function: Callable[[str], None], method: str) -> str | None:
    """None if it works; otherwise the first sentence of what the user is told.

    Raises:
        AssertionError: it ended, and the result is not right.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(method)
        except (ValueError, NotImplementedError, TypeError) as error:
            return re.split(r"(?<=[a-z)\]`])[.:] ", " ".join(str(error).split()))[0].rstrip(".")
    return None


def rows(capabilities: dict[str, Callable[[str], None]], methods: Sequence[str] = tuple(METHODS)) -> list[str]:
    """A line of the table for each: yes or no for each method, and the reason."""
    found = []
    for name, function in capabilities.items():
        answers = [tried(function, method) for method in methods]
        reasons = list(dict.fromkeys(answer.replace("|", "\\|") for answer in answers if answer))
        found.append(
            f"| {' | '.join([name, *('no' if each else 'yes' for each in answers), '; '.join(reasons[:1])])} |"
        )
    return found


def table(capabilities: dict[str, Callable[[str], None]]) -> str:
    head = f"| | {' | '.join(METHODS)} | what is said |\n|---|{'---|' * len(METHODS)}---|"
    return "\n".join([head, *rows(capabilities)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cheap", action="store_true", help="leave out compiling and exporting")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    options = parser.parse_args()
    text = table(CAPABILITIES if options.cheap else {**CAPABILITIES, **SLOW})
    print(text)
    if options.page:
        before, _, rest = options.page.read_text().partition(BEGIN)
        options.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
