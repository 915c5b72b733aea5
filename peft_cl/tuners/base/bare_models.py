"""`load_adapter` and `from_pretrained` of transformers: our adapters are loaded there as PEFT loads them.

transformers copies a file's tensors into the model by their names, whatever these are: one that bears the name of a
backbone's weight replaces it, one that is missing stays random, and neither is an error. So on models without a
`PeftModel` around them, our adapters take PEFT's way, with the checks on it. Those of other methods are not touched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, load_peft_weights
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.loading_report import LoadStateDictInfo

from ...disk import check_file
from .config import PromptPoolConfig


#: Words of a download that both libraries have.
WORDS = ("subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only")


def enter_transformers() -> None:
    """Have `load_adapter` of transformers' models load our adapters as PEFT does; a second call changes nothing."""
    if not hasattr(PeftAdapterMixin.load_adapter, "of_peft_cl"):
        PeftAdapterMixin.load_adapter = _with_checks(PeftAdapterMixin.load_adapter)


def _with_checks(load_adapter: Callable) -> Callable:
    signature = inspect.signature(load_adapter)

    @functools.wraps(load_adapter)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        words = given.arguments
        place, config, downloads = _what_is_meant(words)
        if not isinstance(config, PromptPoolConfig) or words["hotswap"] is True:
            return load_adapter(self, *args, **kwargs)
        name = "default" if words["adapter_name"] is None else words["adapter_name"]
        if self._hf_peft_config_loaded and name in self.peft_config:
            raise ValueError(f"The model has an adapter {name!r} already. Give this one another name by adapter_name.")
        config.inference_mode = not words["is_trainable"]
        weights = words["adapter_state_dict"]
        if weights is None:
            weights = load_peft_weights(place, device=str(self.device), **downloads)
        inject_adapter_in_model(config, self, name)
        self._hf_peft_config_loaded = True
        try:
            set_peft_model_state_dict(self, weights, name)
        except Exception:
            self.delete_adapter(name)  # the base model answers as before
            raise
        if config.inference_mode:
            self.eval()
            for module in self.modules():
                if isinstance(module, BaseTunerLayer):
                    module.requires_grad_(False)
        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    load.of_peft_cl = True
    return load


def _what_is_meant(words: dict[str, Any]) -> tuple[str | None, PeftConfig | None, dict[str, Any]]:
    """Where the adapter is, its configuration, and the words of the download; None for what this does not know."""
    load_config, config = words["load_config"], words["peft_config"]
    found = {**(getattr(load_config, "download_kwargs", None) or {}), **(words["adapter_kwargs"] or {})}
    downloads = {word: found[word] for word in WORDS if found.get(word)}
    if words["local_files_only"]:
        downloads["local_files_only"] = True
    place = words["peft_model_id"] or getattr(load_config, "pretrained_model_name_or_path", None)
    if config is None and place is not None:
        place = str(place)
        config = _read(place, downloads)
    return place, config, downloads


def _read(place: str, downloads: dict[str, Any]) -> PeftConfig | None:
    check_file(Path(place, downloads.get("subfolder", ""), CONFIG_NAME))
    try:
        kind = PeftConfig._get_peft_type(place, **downloads)
    except (ValueError, KeyError, TypeError):  # transformers has its own words for it
        return None
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if known is None or not issubclass(known, PromptPoolConfig):
        return None
    return known.from_pretrained(place, **downloads)
