"""DINOv2, with registers and without: the classifier reads the CLS token and the mean of the patches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from .family import Family


@dataclass(frozen=True)
class Dinov2Family(Family):
    """Registers stand between the CLS token and the patches, and are read by nobody."""

    def num_special(self, encoder: nn.Module) -> int:
        return self.special_tokens + getattr(encoder.config, "num_register_tokens", 0)


#: What a layer and the classifier are in DINOv2 and DINOv3.
DINO = {
    "norms": ("norm1", "norm2"),
    "branches": (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
    "interpolates": False,
    "reads": "cls+mean",
}
DINOV2 = Dinov2Family(
    "dinov2",
    ("Dinov2ForImageClassification",),
    encoder="dinov2",
    layers="encoder.layer",
    **DINO,
)

FAMILIES = (
    DINOV2,
    replace(
        DINOV2,
        model_type="dinov2_with_registers",
        model_classes=("Dinov2WithRegistersForImageClassification",),
        encoder="dinov2_with_registers",
    ),
)
