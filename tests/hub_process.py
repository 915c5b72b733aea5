"""A client of the Hub: `hub_process.py share PLACE FOLDER TOKEN` or `hub_process.py load PLACE FOLDER TOKEN`.

PLACE is the folder of the fixture of that name, FOLDER is written into. `share` pushes four repositories:

- `user/adapter`: an adapter in training, by `model.push_to_hub`;
- `user/run`: a run, by `trainer.push_to_hub` after its end, with the token TOKEN;
- `user/automatic`: a run, by `train()` itself, with the settings that make the Trainer push most;
- `user/cli`: a run of `peft-cl train` on the backbone `user/base` of the Hub, with TOKEN on the command line.

`load` fetches them, as another machine would, and tries to push with TOKEN. Both print what they saw as JSON in their
last line.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import ViTForImageClassification, ViTImageProcessorPil

from peft_cl import CodaPromptConfig, ContinualTrainer, ContinualTrainingArguments, class_incremental
from peft_cl.cli import main


CLASSES = ["cat", "dog", "eel", "fox"]  # one more than the base model's own head has


def base_model(place: Path) -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(place / "model").eval()


def adapted(place: Path) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base_model(place), CodaPromptConfig(components_per_task=2, prompt_length=4, layers=[0, 1]))


def predictions(model: PeftModel) -> dict[str, Any]:
    """What the model says of fixed images, and which classes it names."""
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(pixels).logits
    return {"logits": logits.tolist(), "classes": list(model.config.id2label.values())}


def make_trainer(place: Path, folder: Path, **arguments: Any) -> ContinualTrainer:
    """A run of two tasks with a checkpoint at each of its four steps."""
    return ContinualTrainer(
        adapted(place),
        ContinualTrainingArguments(
            str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=0.02,
            save_strategy="steps",
            save_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            pictures=False,
            **arguments,
        ),
        class_incremental(load_dataset(str(place / "data")), num_tasks=2),
        processing_class=ViTImageProcessorPil.from_pretrained(place / "model"),
    )


def run_command(*words: str) -> dict[str, Any]:
    """The command's exit status and what it prints."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(words)
    return {"status": status, "output": output.getvalue(), "errors": errors.getvalue()}


def train(place: Path, folder: Path, name: str, token: str) -> dict[str, Any]:
    """The command, told to push to the repository `name`, and each checkpoint too."""
    settings = {"push_to_hub": "true", "hub_model_id": name, "hub_token": token}
    settings |= {"hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": "1"}
    dotted = [word for setting, value in settings.items() for word in (f"--training.{setting}", value)]
    words = ("--model.name", "user/base", "--output_dir", str(folder))
    return run_command("train", str(place / "config.yaml"), *words, *dotted)


def share(place: Path, folder: Path, token: str) -> dict[str, Any]:
    model = adapted(place)
    model.begin_task(CLASSES)
    with torch.no_grad():  # values that no fresh adapter has
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.normal_()
    model.push_to_hub("user/adapter")

    run = make_trainer(place, folder / "run", hub_model_id="user/run", hub_token=token)
    run.train()
    run.push_to_hub()

    often = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    make_trainer(place, folder / "automatic", hub_model_id="user/automatic", **often).train()

    command = train(place, folder / "cli", "user/cli", token)
    return {"adapter": predictions(model), "train": command}


def load(place: Path, folder: Path, token: str) -> dict[str, Any]:
    return {
        "adapter": predictions(PeftModel.from_pretrained(base_model(place), "user/adapter")),
        "info": run_command("info", "user/run", "--json"),
        "evaluate": run_command("evaluate", "user/cli", "--dataset", str(place / "data"), "--json"),
        "missing": run_command("info", "user/nothing"),
        "refused": train(place, folder, "user/refused", token),
    }


if __name__ == "__main__":
    word, place, folder, token = sys.argv[1:]
    seen = {"share": share, "load": load}[word](Path(place), Path(folder), token)
    print(json.dumps(seen))
