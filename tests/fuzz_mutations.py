"""Variants of files that others made, by mutation from good ones; each is drawn from its number's seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file


Variant = Callable[[random.Random, Path], str]

ADAPTER, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "results.json"
PROCESSOR, SNAPSHOT = "preprocessor_config.json", "_state/sequence.pt"
#: What reads which file.
READERS = {
    ADAPTER: ("info", "evaluate", "peft", "bare", "plot", "resume"),
    WEIGHTS: ("info", "evaluate", "peft", "bare", "plot"),
    RECORD: ("info", "evaluate", "plot", "resume"),
    PROCESSOR: ("evaluate",),
    SNAPSHOT: ("resume",),
    "backbone/config.json": ("evaluate",),
    "backbone/model.safetensors": ("evaluate",),
}
JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    7,
    0.5,
    1e308,
    float("nan"),
    10**9,
    10**30,
    "",
    "x",
    "y" * 100_000,
    "\x1b[31mred",
    "\ud800",
    "../../victim",
    "/dev/zero",
    [],
    {},
    [[]],
    [0] * 5000,
    {"a": {"b": [1]}},
    ["a", "a"],
)


def mutate_json(rng: random.Random, file: Path) -> None:
    """Replace, remove, rename or add one to three entries, wherever they are."""
    content = json.loads(file.read_text())
    for _ in range(rng.randint(1, 3)):
        _mutate(rng, content)
    file.write_text(json.dumps(content))


def _mutate(rng: random.Random, content: Any) -> None:
    places = [
        (part, key)
        for part in _parts(content)
        for key in (part if isinstance(part, dict) else range(min(len(part), 50)))
    ]
    if not places:
        return
    part, key = rng.choice(places)
    how = rng.choice(["replace"] * 4 + ["remove", "rename", "swap"])
    if how == "replace":
        part[key] = rng.choice(JUNK)
    elif how == "remove":
        del part[key]
    elif how == "rename" and isinstance(part, dict):
        part[f"{key}_"] = part.pop(key)
    else:
        other, name = rng.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            part[key] = json.loads(json.dumps(other[name]))


def _parts(content: Any) -> list:
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    found = [content] if isinstance(content, (dict, list)) else []
    return found + [part for each in list(inside)[:50] for part in _parts(each)]


def mutate_bytes(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "insert", "zeros", "empty", "twice"])
    place = rng.randrange(len(content) or 1)
    if how == "flip":
        for _ in range(rng.choice([1, 3, 30])):
            # Most of a weight file is numbers: half of the flips go into its beginning.
            content[rng.randrange(min(len(content), rng.choice([300, 10**9])))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "insert":
        content[place:place] = rng.randbytes(rng.choice([1, 8, 1000]))
    elif how == "zeros":
        content[place : place + 100] = bytes(len(content[place : place + 100]))
    elif how == "empty":
        content.clear()
    else:
        content += bytes(content)
    file.unlink()
    file.write_bytes(content)


def mutate_tensors(rng: random.Random, file: Path) -> None:
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    how = rng.choice(["drop", "add", "kind", "spoil", "shape", "rename", "huge", "nothing left", "backbone"])
    if how == "drop":
        del tensors[name]
    elif how == "add":
        tensors[rng.choice([f"{name}x", "extra", "a/../b", "base_model.model.classifier.weight"])] = torch.ones(2)
    elif how == "kind":
        tensors[name] = value.to(rng.choice([torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64]))
    elif how == "spoil":
        tensors[name] = torch.full_like(value, rng.choice([float("nan"), float("inf"), 3e38]))
    elif how == "shape":
        tensors[name] = rng.choice(
            [value[None].clone(), value.flatten().clone(), value.new_zeros(3, 5), torch.tensor(1.0)]
        )
    elif how == "rename":
        tensors[name.replace("_", "-", 1)] = tensors.pop(name)
    elif how == "huge":
        tensors[name] = value.new_zeros(2000, 2000)
    elif how == "nothing left":
        tensors = {"x": torch.zeros(0)}
    else:
        tensors["base_model.model.vit.layernorm.weight"] = torch.zeros(24)
    save_file(tensors, file)


def mutate_snapshot(rng: random.Random, file: Path) -> None:
    """Junk under a right digest: a member of the state is replaced, or bytes of it change."""
    content = file.read_bytes()[32:]
    if rng.random() < 0.3:
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        content = bytes(changed)
    else:
        state = (
            torch.load(file.parent / "state.pt", weights_only=True) if (file.parent / "state.pt").exists() else None
        )
        aside = file.parent / "state.pt"
        aside.write_bytes(content)
        state = torch.load(aside, weights_only=True)
        place, key = rng.choice([(part, key) for part in _dicts(state) for key in part])
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice([*JUNK, torch.zeros(2), torch.full((3, 4), float("nan"))])
        torch.save(state, aside)
        content = aside.read_bytes()
        aside.unlink()
    file.write_bytes(hashlib.sha256(content).digest() + content)
    (file.parent / "sequence.previous.pt").unlink(missing_ok=True)


def _dicts(content: Any) -> list[dict]:
    if not isinstance(content, dict):
        return []
    return ([content] if content else []) + [part for each in content.values() for part in _dicts(each)]


def mutate_yaml(rng: random.Random, file: Path) -> None:
    if rng.random() < 0.3:
        mutate_bytes(rng, file)
        return
    content = yaml.safe_load(file.read_text())
    for _ in range(rng.randint(1, 2)):
        _mutate(rng, content)
    file.write_text(yaml.safe_dump(content))


def mutate_image(rng: random.Random, run: Path) -> None:
    files = sorted((run.parent / "data").rglob("*.png"))
    mutate_bytes(rng, rng.choice(files))


def mutation(index: int) -> Variant:
    """The variant of that number: which file, how, and what is done with it follow from the number."""

    def make(rng: random.Random, run: Path) -> str:
        what = index % 10
        if what == 8:
            mutate_yaml(rng, run.parent / "config.yaml")
            return "train"
        if what == 9:
            mutate_image(rng, run)
            return "evaluate"
        name = [ADAPTER, ADAPTER, WEIGHTS, WEIGHTS, RECORD, SNAPSHOT, PROCESSOR, "backbone/config.json"][what]
        if name.startswith("backbone"):
            name = rng.choice(["backbone/config.json", "backbone/model.safetensors"])
            add_backbone(run)
        file = run / name
        special = {".safetensors": mutate_tensors, ".json": mutate_json, ".pt": mutate_snapshot}[file.suffix]
        rng.choice([mutate_bytes, special, special])(rng, file)
        return rng.choice(READERS[name])

    return make


def add_backbone(run: Path) -> None:
    """A copy of the base model beside the adapter, as fine-tuning saves one."""
    base = Path(json.loads((run / ADAPTER).read_text())["base_model_name_or_path"])
    (run / "backbone").mkdir()
    for name in ("config.json", "model.safetensors"):
        (run / "backbone" / name).write_bytes((base / name).read_bytes())
