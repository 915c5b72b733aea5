"""What a backbone and a processor that others made may not do: run code of theirs, or ask for impossible sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..backbones import FAMILIES, loader_of
from ..disk import check_file
from ..text import brief
from .errors import CommandError


#: The most that a configuration may ask for: far more than any published vision transformer has.
MOST = {
    "num_hidden_layers": 1000,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_attention_heads": 2**12,
    "image_size": 8192,
    "patch_size": 8192,
    "num_channels": 1024,
}
#: Pixels of a side that a processor may make an image of.
MOST_PIXELS = 8192
SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
#: Parameters that a folder's weights may lack, such as a new classifier's.
SLACK = 10**8


@contextmanager
def no_code_of(what: str, name: str) -> Iterator[None]:
    """Say in our words that transformers refused to run code that comes with a model, or choked on its files."""
    try:
        yield
    except (AttributeError, IndexError, AssertionError, StrictDataclassError) as error:
        raise ValueError(f"its files are damaged ({type(error).__name__}: {error}); restore them.") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CommandError(
            f"The {what} {name!r} needs code of its own (auto_map), which is not run on this machine unless you say "
            "so; nothing was run. Take one that transformers knows; or, if you have read the code and trust it, set "
            "model.trust_remote_code to true in the configuration (peft-cl evaluate and predict: "
            "--trust-remote-code)."
        ) from error


def check_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Refuse a model's configuration whose sizes no weights have, before anything of these sizes is made; return it.

    Raises:
        ValueError: it names the setting, its value and the rule.
    """
    folder = Path(path)
    check_file(folder / "config.json")
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    towers = [config, *(getattr(config, name) for name in ("vision_config", "text_config") if hasattr(config, name))]
    for (name, most), part in itertools.product(MOST.items(), towers):
        value = getattr(part, name, None)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in numbers:
            if number is not None and not (isinstance(number, int) and 1 <= number <= most):
                raise ValueError(
                    f"{name} is {brief(value)} in its config.json, but must be a whole number from 1 to {most:,}. The "
                    "file is damaged: restore it, or give another model."
                )
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
    if not held or config.model_type not in FAMILIES:
        return config
    with torch.device("meta"):
        loader = loader_of(config)
        make = getattr(loader, "from_config", None) or loader._from_config  # an Auto class, or a model's own
        asked = sum(value.numel() for value in make(config).parameters())
    if asked > 2 * held + SLACK:  # a number has half a byte at least
        raise ValueError(
            f"its config.json asks for {asked:,} numbers, but its weights have {held:,} bytes. The files do not "
            "belong together: restore them, or give another model."
        )
    return config


def check_weights(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Refuse a backbone that is not all there, or holds numbers that are none.

    Raises:
        ValueError: it names the weights.
    """
    lacking = sorted(name for name in missing if "classifier" not in name)
    if lacking:
        raise ValueError(
            f"its file lacks {brief(lacking)}, which would be random numbers. Copy or download the model again."
        )
    spoilt = sorted(
        name
        for name, value in model.named_parameters()
        if "classifier" not in name and value.is_floating_point() and not value.isfinite().all()
    )
    if spoilt:
        raise ValueError(
            f"{brief(spoilt)} hold numbers that are not finite (NaN or infinite), so all predictions would be a "
            "guess. Restore the file; a model that overflows in float16 is loaded in bfloat16."
        )


def check_pixels(processor: Any) -> None:
    """Refuse a processor that makes images of impossible sizes, or cannot make one.

    Raises:
        ValueError: it names the setting, its value and the rule.
    """
    settings = processor.to_dict()
    for name in ("size", "crop_size", "pad_size"):
        value = settings.get(name)
        sides = [value.get(side) for side in SIDES] if isinstance(value, Mapping) else [value]
        for side in sides:
            if side is not None and not (isinstance(side, int) and 1 <= side <= MOST_PIXELS):
                raise ValueError(
                    f"{name} is {brief(value)}, but must be whole numbers of pixels from 1 to {MOST_PIXELS:,}. Set "
                    f"processor.{name}, or restore preprocessor_config.json."
                )
    try:
        made = processor(images=Image.new("RGB", (32, 24)), return_tensors="pt")["pixel_values"]
    except Exception as error:  # whatever its settings lead to
        raise ValueError(
            f"its settings do not work ({type(error).__name__}: {error}). Restore preprocessor_config.json, or set "
            "them in the section processor."
        ) from error
    if not made.isfinite().all():
        raise ValueError(
            f"image_mean {brief(settings.get('image_mean'))} and image_std {brief(settings.get('image_std'))} make "
            "pixels that are no numbers. Restore preprocessor_config.json, or set them in the section processor."
        )
