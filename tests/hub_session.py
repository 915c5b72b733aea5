"""A client of the Hub that does what it is told: a line of JSON in, a line of JSON out, until its input ends.

It is a process of its own, as huggingface_hub reads HF_ENDPOINT on import, and one for many requests, as importing
takes longest. `{"do": name, "words": [...]}` calls the function of that name below.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
import warnings
from typing import Any

import peft_cl  # before the loaders of others, and all that they need


def command(*words: str) -> int:
    """`peft-cl` with these words; its exit status."""
    from peft_cl.cli import main

    return main(words)


def push(folder: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    commit = peft_cl.push_adapter(folder, name, **options)
    return {"url": commit.commit_url, "pull_request": commit.pr_url}


def ways(name: str, base: str) -> dict[str, Any]:
    """Logits of one image, by each of the loaders that take the name of an adapter."""
    import torch
    from peft import AutoPeftModel, PeftModel
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    processor = AutoImageProcessor.from_pretrained(name)
    pixels = processor(Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 9).convert("RGB"), return_tensors="pt")
    loaded = {
        "PeftModel": PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), name),
        "AutoPeftModel": AutoPeftModel.from_pretrained(name),
        "AutoModelForImageClassification": AutoModelForImageClassification.from_pretrained(name),
        "pipeline": pipeline("image-classification", model=name, device="cpu").model,
    }
    with torch.no_grad():
        logits = {way: model.eval()(**pixels).logits.tolist() for way, model in loaded.items()}
    return {"logits": logits, "labels": list(loaded["pipeline"].config.id2label.values())}


def whole(name: str) -> list:
    """Logits of one image, by the loader that finds the base model itself, also one that lies beside the adapter."""
    import torch
    from peft import AutoPeftModel

    with torch.no_grad():
        return (
            AutoPeftModel.from_pretrained(name).eval()(torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).logits.tolist()
        )


def load(name: str, base: str) -> list[str]:
    """The classes of an adapter, by PEFT's own loader."""
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    return list(PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), name).config.id2label)


def validate(text: str) -> None:
    """A card by the Hub's own check."""
    from huggingface_hub import ModelCard

    ModelCard(text).validate()


def metric(name: str, rows: dict[str, Any]) -> dict[str, Any]:
    """What a metric of the Hub gives for some predictions."""
    import evaluate

    return evaluate.load(name).compute(**rows)


def execute(code: str, folder: str) -> None:
    """Code of a page, in a folder."""
    with contextlib.chdir(folder):
        exec(code, {})


def command_in(folder: str, *words: str) -> int:
    with contextlib.chdir(folder):
        return command(*words)


def answer(do: str, words: list[Any]) -> dict[str, Any]:
    """What the function gives and prints, and the fault that it ends with."""
    output, errors, value, fault = io.StringIO(), io.StringIO(), None, None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            value = globals()[do](*words)
        except Exception as error:
            fault = {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    return {"value": value, "output": output.getvalue(), "errors": errors.getvalue(), "fault": fault}


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request["do"], request["words"])), flush=True)
