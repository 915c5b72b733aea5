"""ViT and what has its form: DeiT, ViT-MSN, and ViT-MAE, which is loaded as a ViT."""

from __future__ import annotations

from .family import Family


FAMILIES = (
    Family("vit", ("ViTForImageClassification",), encoder="vit"),
    Family("deit", ("DeiTForImageClassification",), encoder="deit", special_tokens=2),
    Family("vit_msn", ("ViTMSNForImageClassification",), encoder="vit"),
    # Its own model hides and shuffles patches, and has no classifier: ViT's model takes the same weights.
    Family("vit_mae", ("ViTForImageClassification",), encoder="vit"),
)
