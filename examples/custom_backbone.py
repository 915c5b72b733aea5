"""A family of backbones of your own: one row, and all methods, heads and commands work on its models.

    python examples/custom_backbone.py

I-JEPA (Assran et al. 2023) is made known here. It is a ViT without CLS token, whose classifier reads the mean of the
patches; in transformers its layers have ViT's names, so a row is enough. A family that does other things between its
layers is a subclass with the methods that differ: see `peft_cl/backbones/family.py` for what there is, and the files
beside it for what others needed. The backbone here is small and random: what it shows is that it works.
"""

from __future__ import annotations

from peft import get_peft_model
from transformers import IJepaConfig, IJepaForImageClassification, ViTImageProcessor, set_seed

from peft_cl import ContinualTrainer, ContinualTrainingArguments, L2PConfig, class_incremental
from peft_cl.backbones import Family, register_family
from peft_cl.commands.digits import draw_digits_dataset


IJEPA = Family("ijepa", ("IJepaForImageClassification",), encoder="ijepa", special_tokens=0, reads="mean")

if __name__ == "__main__":
    register_family(IJEPA)
    set_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    backbone = IJepaForImageClassification(IJepaConfig(image_size=32, patch_size=8, **sizes))  # or from_pretrained
    trainer = ContinualTrainer(
        get_peft_model(backbone, L2PConfig.from_preset("best", layers="all")),
        ContinualTrainingArguments("out/custom_backbone", num_train_epochs=2),
        class_incremental(draw_digits_dataset(), num_tasks=5),
        processing_class=ViTImageProcessor(size={"height": 32, "width": 32}),
    )
    trainer.train()
    print(f"{trainer.results.method} on I-JEPA: {trainer.metrics['average_accuracy']:.1%} of the digits")
