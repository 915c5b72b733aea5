"""Files shipped inside the package: the embedded default backbone."""

from __future__ import annotations

from importlib.resources import files

from .resolving import resolve_backbones_beside, resolve_embedded_names


__all__ = ["default_backbone"]


def default_backbone() -> str:
    """Return the folder of the embedded backbone, `vit-tiny-64`: it needs no download.

    It is a `ViTForImageClassification` for images of 64 x 64 pixels (patch 8, hidden size 192, 6 layers, 3 heads,
    2.7 M parameters, float16), trained on 100 Tiny-ImageNet classes; its model card, `README.md` in the same folder,
    states its limits. Any `from_pretrained` of transformers takes the path, and, once peft_cl is imported, the name
    `"vit-tiny-64"`, by which adapters on it name their base model.

    Returns:
        `str`: the absolute path of a folder holding `config.json`, `model.safetensors` and `preprocessor_config.json`.

    Example:
        ```python
        >>> from transformers import AutoImageProcessor, AutoModelForImageClassification
        >>> from peft_cl.assets import default_backbone

        >>> model = AutoModelForImageClassification.from_pretrained(default_backbone(), dtype="float32")
        >>> processor = AutoImageProcessor.from_pretrained(default_backbone())
        ```
    """
    return str(files(__name__) / "vit-tiny-64")


resolve_embedded_names()
resolve_backbones_beside()
