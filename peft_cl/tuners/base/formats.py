"""The formats of adapters: what each added, and what an earlier version would take it for."""

from __future__ import annotations

from typing import Any


#: Settings that versions before a format would leave out without a word, with the value that they take them for. What
#: is needed by no setting is written in format 1, which all read.
SINCE_FORMAT: dict[int, dict[str, Any]] = {
    2: {
        "head": "linear",
        "head_options": {},
        "head_features": None,
        "head_layers": 1,
        "train_prompts": "every_task",
        "drift_compensation": None,
        "interpolate_pos_encoding": False,
    },
    3: {
        "similarity": "cosine",
        "key_size": None,
        "query_layer": None,
        "token_order": "prompts_first",
        "init_from": None,
        "init_layers": "independent",
        "init_noise": 0.02,
        "key_init": "init",
        "growth": None,
        "growth_size": 5,
        "growth_similarity": 0.5,
        "growth_entropy": 0.95,
        "max_pool_size": None,
        "past_rows": "trained",
        "orthogonality_scope": "layer",
        "adaptive_orthogonality": False,
        "diversity_coefficient": 0.0,
        "alignment_coefficient": 0.0,
        "grown": None,
        "known_task_rows": False,
        "expert_choice": "task",
        "train_g_prompts": "every_task",
        "temperature": 1.0,
        "storage_dtype": "float32",
    },
    4: {"joined": None, "joined_prompts": "apart"},
}
#: The same of settings that other methods had before, or that begin otherwise there, by `PromptPoolConfig.method`.
OF_METHOD: dict[str, dict[int, dict[str, Any]]] = {
    "L2P": {
        3: {
            "orthogonality_coefficient": 0.0,
            "orthogonality": "pairwise",
            "selection": "topk",
            "selection_temperature": 0.1,
            "selection_threshold": 0.0,
            "search": "exact",
        }
    },
    "DualPrompt": {3: {"orthogonality_coefficient": 0.0, "orthogonality": "pairwise", "entropy_coefficient": 0.0}},
    "CODA-Prompt": {3: {"init": "orthogonal"}},
}
#: The newest format that this version reads.
FORMAT_VERSION = max(SINCE_FORMAT)


def added(config: Any) -> dict[str, tuple[int, Any]]:
    """Name of each setting that a format added -> that format, and what earlier versions take the setting for."""
    tables = (SINCE_FORMAT, OF_METHOD.get(config.method, {}))
    return {
        name: (version, value)
        for table in tables
        for version, settings in table.items()
        for name, value in settings.items()
    }


def format_needed(config: Any) -> int:
    """The oldest format that says all that the settings of `config` do."""
    needed = [version for name, (version, value) in added(config).items() if getattr(config, name, value) != value]
    return max(needed, default=1)
