"""Options of the pools through the command: a run with them, its record, its card, and the adapter that it leaves."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification

from peft_cl import RunResults
from peft_cl.cli import main


RUNS = {
    "l2p": {
        "pool_size": "auto",
        "prompt_length": 2,
        "top_k": 2,
        "init": "patches",
        "key_init": "queries",
        "growth": "every_task",
        "growth_size": 2,
        "selection": "soft",
        "diversity_coefficient": 0.1,
        "query_layer": 0,
    },
    "dualprompt": {
        "pool_size": "auto",
        "expert_choice": "key",
        "layers": [1],
        "g_layers": [0],
        "growth": "adaptive",
        "growth_similarity": 1.0,
        "past_rows": "frozen",
        "train_g_prompts": "first_task",
        "entropy_coefficient": 0.1,
        "alignment_coefficient": 0.1,
    },
    "coda": {
        "components_per_task": None,
        "pool_size": "auto",
        "prompt_length": 4,
        "layers": [0, 1],
        "init": "normal",
        "init_layers": "hierarchical",
        "similarity": "dot",
        "query_projection": "linear",
        "key_size": 6,
        "adaptive_orthogonality": True,
        "orthogonality": "products",
    },
}
PRESETS = {"l2p": "paper", "dualprompt": "paper", "coda": "best"}
GROWN = {"l2p": [2], "dualprompt": [5], "coda": None}


@pytest.mark.parametrize("method", RUNS)
def test_a_run_with_options(method, place, tmp_path):
    adapter = json.dumps(RUNS[method])
    words = ["train", str(place / "config.yaml"), "--method", method, "--adapter", adapter]
    words += ["--preset", PRESETS[method]]
    assert main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    results = RunResults.load(tmp_path / "run")
    settings = results.hyperparameters["adapter"]
    assert settings["pool_size"] == 10  # two tasks of two classes: the least that the rule gives
    for name, value in RUNS[method].items():
        if name != "pool_size" and value is not None:
            assert settings[name] == value, name
    assert "grown" not in settings
    base = AutoModelForImageClassification.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "run")
    config = model.peft_config["default"]
    assert config.grown == GROWN[method] and config.format_version == 3
    assert model.base_model.pool.rows_in_use == 10 + sum(GROWN[method] or [])
    assert torch.isfinite(model(torch.zeros(1, 3, 16, 16)).logits).all()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "growth" in card or method == "coda"
