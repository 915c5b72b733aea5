"""Variants of files that others made, from a list of kinds. What is drawn is drawn from seeds.

A variant is a function `(rng, run) -> action`: it damages the folder `run` (a finished run with its adapter; its data
is in `data` beside it, its configuration in `config.yaml`) and says what is to be done with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_mutations import (
    ADAPTER,
    PROCESSOR,
    READERS,
    RECORD,
    SNAPSHOT,
    WEIGHTS,
    Variant,
    add_backbone,
)


class Runs:
    """Unpickled, it leaves a mark in the working directory."""

    def __reduce__(self):
        return os.system, ("touch MARK",)


def _facts(name: str, **changes: Any) -> Variant:
    def make(rng: random.Random, run: Path) -> str:
        file = run / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return rng.choice(READERS[name])

    return make


def _text(name: str, text: str | bytes, action: str | None = None) -> Variant:
    def make(rng: random.Random, run: Path) -> str:
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return action or rng.choice(READERS[name])

    return make


def _link(name: str, target: str, action: str) -> Variant:
    """`target` is a path from the run's parent, or an absolute one."""

    def make(rng: random.Random, run: Path) -> str:
        place = run / name
        if place.is_dir() and not place.is_symlink():
            place.rename(run.parent / "moved")
        place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(run.parent / target)
        return action

    return make


def _pipe(name: str, action: str) -> Variant:
    def make(rng: random.Random, run: Path) -> str:
        place = run / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        os.mkfifo(place)
        return action

    return make


def _sparse(name: str, *actions: str) -> Variant:
    def make(rng: random.Random, run: Path) -> str:
        with open(run / name, "ab") as file:
            file.truncate(10**12)
        return rng.choice(actions)

    return make


def _header(header: dict[str, Any] | bytes, action: str) -> Variant:
    """A safetensors file with this header and some bytes of content."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _text(WEIGHTS, struct.pack("<Q", len(text)) + text + bytes(64), action)


def _snapshot(content: Callable[[], bytes]) -> Variant:
    def make(rng: random.Random, run: Path) -> str:
        data = content()
        (run / SNAPSHOT).write_bytes(hashlib.sha256(data).digest() + data)
        return "resume"

    return make


def _code(where: str) -> Variant:
    """A model type that transformers does not know, with code that leaves a mark."""

    def make(rng: random.Random, run: Path) -> str:
        add_backbone(run)
        folder = run / "backbone" if where == "config.json" else run
        (folder / "own.py").write_text("import os\nos.system('touch MARK')\nclass Own: pass\n")
        kinds = {
            "AutoConfig": "own.Own",
            "AutoModelForImageClassification": "own.Own",
            "AutoImageProcessor": "own.Own",
        }
        changes = {"auto_map": kinds, "model_type": "own"} if where == "config.json" else {"auto_map": kinds}
        changes |= {"image_processor_type": "Own"} if where == PROCESSOR else {}
        file = folder / where
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return "evaluate"

    return make


def _pickle(name: str, action: str) -> Variant:
    def make(rng: random.Random, run: Path) -> str:
        if name == "adapter_model.bin":
            (run / WEIGHTS).unlink()
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(run / name, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Runs(), protocol=2))
            file.writestr("archive/version", "3")
        return action

    return make


def _image(content: bytes | None, name: str = "broken.png") -> Variant:
    def make(rng: random.Random, run: Path) -> str:
        place = run.parent / "data" / "test" / "red" / name
        if content is None:
            place.symlink_to("/dev/zero")
        else:
            place.write_bytes(content)
        return "evaluate"

    return make


def _yaml(text: str) -> Variant:
    def make(rng: random.Random, run: Path) -> str:
        (run.parent / "config.yaml").write_text(text)
        return "train"

    return make


def _torch_bytes(value: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        import io

        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    return make


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 90000, 90000, 8, 2, 0, 0, 0) + b"\0\0\0\0"
KEY = "base_model.model.vit.codaprompt_pool.keys"

KINDS: dict[str, Variant] = {
    **{
        f"adapter: {name} {str(value)[:20]}": _facts(ADAPTER, **{name: value})
        for name, values in {
            "tasks": ([[0, -1], [2, 3]], [0, 1], None, [[0, 1], [1, 2]], [[0, 1], [2]], "01", [[]] * 10**5),
            "classes": (["a", "a", "b", "c"], [1, 2, 3, 4], None, [f"c{index}" for index in range(300_000)]),
            "rows_in_use": (-1, "4", 10**9),
            "task_evidence": (1e308, "1", float("nan")),
            "components_per_task": (10**8, 10**18, -1, "2", None),
            "pool_size": ("auto", 10**18, "x" * 10**5),
            "grown": ([10**9], "5", [-1], [1] * 10**6),
            "joined": ([[10**9, 1]], "5", [[-1, 1]], [[2, 1]] * 10**6, [[1, 1]], [2, 1], [[2, 1]]),
            "key_size": (10**9, "5"),
            "query_layer": (10**9, 0.5, "x"),
            "init": ("adapter", "patches", ["x"]),
            "init_from": ("/dev/zero", "https://example.org/x", ["a"]),
            "temperature": (0, -1, 1e308, "1", float("nan"), 1e-300),
            "storage_dtype": ("float8", "float16", ["x"]),
            "adaptive_orthogonality": (True, "yes"),
            "prompt_length": (10**8, 3, 0),
            "layers": ([0] * 10**5, list(range(10**5)), [-1], "0"),
            "head": (["linear"], "__class__", "aligned"),
            "head_options": ({"x": 1}, [1], {"fourier": 10**9}),
            "peft_type": ("LORA", "NONE", ["X"], None, "L2P"),
            "base_model_name_or_path": ("/dev/zero", "../victim", "https://example.org/x", ["a"], "x" * 10**5, None),
            "format_version": (99, "3", None),
            "base_weights": ({"bfloat16": 1}, "x", {"bfloat16": "0" * 16}),
            "target_modules": (["vit"], "all-linear"),
            "auto_mapping": ({"parent_library": "os", "base_model_class": "system"}, [1]),
            "task_type": ("SEQ_CLS", ["X"]),
        }.items()
        for value in values
    },
    **{
        f"record: {name} {str(value)[:20]}": _facts(RECORD, **{name: value})
        for name, value in {
            "accuracy_matrix": [[5, -1], [0, 0]],
            "metrics": {"average_accuracy": -1},
            "task_names": ["x" * 10**6, "b"],
            "finished_tasks": 10**9,
            "hyperparameters": {"backbone_dtype": "os.system", "data": [1], "adapter": 3},
            "scenario": {"name": ["x"], "class_order": 1, "classes_per_task": "ab"},
            "versions": {"a": [1]},
            "prompt_usage": [[1e308, 1e308], [float("nan"), 1]],
            "own_metrics": {"<b>": [1e400, [[[[[[[[[1]]]]]]]]]]},
            "test_sizes": [10**30, 1],
            "train_seconds": 1e400,
            "base_model": "<script>alert(1)</script>",
        }.items()
    },
    **{f"brackets in {name}": _text(name, "[" * 10**6) for name in (ADAPTER, RECORD, PROCESSOR)},
    **{f"a list for {name}": _text(name, "[1, 2]") for name in (ADAPTER, RECORD, PROCESSOR)},
    **{f"UTF-16 in {name}": _text(name, "{}".encode("utf-16")) for name in (ADAPTER, RECORD, PROCESSOR)},
    # PEFT itself reads a configuration whole, before anything of ours is asked.
    "a configuration of a terabyte": _sparse(ADAPTER, "info", "evaluate"),
    "a record of a terabyte": _sparse(RECORD, "info", "plot", "evaluate"),
    "weights of a terabyte": _sparse(WEIGHTS, "info", "peft", "bare", "evaluate"),
    **{
        f"link at {name} ({action})": _link(name, target, action)
        for name, target in {
            ".saved": "victim",
            ".saving": "victim",
            "_state": "victim",
            "_state/task_1": "victim",
            "_state/sequence.pt": "victim/file",
            "backbone": "victim",
            "curves.png": "victim/file",
            "README.md": "victim/file",
            ".saved/backbone/file": "victim/file",
        }.items()
        for action in ("resume", "plot", "evaluate")
    },
    **{
        f"{what} at {name}": make(name, action)
        for name, actions in READERS.items()
        for action in actions[:2]
        for what, make in {"pipe": _pipe, "device": lambda name, action: _link(name, "/dev/zero", action)}.items()
    },
    "header: sizes that overflow": _header(
        {KEY: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, "peft"
    ),
    "header: empty of many sets": _header(
        {KEY: {"dtype": "F32", "shape": [10**9, 0, 24], "data_offsets": [0, 0]}}, "plot"
    ),
    "header: keys without sets": _header({KEY: {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, "plot"),
    "header: keys of one axis": _header({KEY: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}, "plot"),
    "header: offsets behind the end": _header(
        {KEY: {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}, "bare"
    ),
    "header: no JSON": _header(b"{" * 100, "evaluate"),
    "header: too long": _text(WEIGHTS, struct.pack("<Q", 2**62) + b"{}", "info"),
    "snapshot: a list": _snapshot(_torch_bytes([1])),
    "snapshot: an empty one": _snapshot(_torch_bytes({})),
    "snapshot: text": _snapshot(lambda: b"text"),
    "snapshot: a pickle": _snapshot(lambda: pickle.dumps(Runs())),
    "pickle: snapshot": _pickle(SNAPSHOT, "resume"),
    "pickle: adapter": _pickle("adapter_model.bin", "peft"),
    "pickle: adapter, bare": _pickle("adapter_model.bin", "bare"),
    "pickle: adapter, command": _pickle("adapter_model.bin", "evaluate"),
    "pickle: backbone": _pickle("backbone/pytorch_model.bin", "evaluate"),
    "code: model": _code("config.json"),
    "code: processor": _code(PROCESSOR),
    "processor: a million pixels": _facts(PROCESSOR, size={"height": 10**6, "width": 10**6}),
    "processor: no pixels": _facts(PROCESSOR, size={"height": 0, "width": 0}),
    "processor: by zero": _facts(PROCESSOR, image_std=[0, 0, 0]),
    "processor: text": _facts(PROCESSOR, image_mean="x"),
    "image: empty": _image(b""),
    "image: a bomb": _image(BOMB),
    "image: a header": _image(b"\x89PNG\r\n\x1a\n"),
    "image: text": _image(b"<svg/>"),
    "image: a device": _image(None),
    "configuration: aliases": _yaml(ALIASES),
    "configuration: a list": _yaml("[1, 2]"),
    "configuration: a tag": _yaml("!!python/object/apply:os.system ['touch MARK']"),
    "configuration: brackets": _yaml("[" * 10**5),
    "configuration: empty": _yaml(""),
    "configuration: method": _yaml("method: [l2p]"),
}
