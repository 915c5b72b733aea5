"""Learn a sequence of tasks with CODA-Prompt, save the adapter, and use it: all in one page, without a network.

    python examples/class_incremental.py

For CIFAR-100 and a large backbone, replace the two lines that say so.
"""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import CodaPromptConfig, ContinualTrainer, ContinualTrainingArguments, class_incremental
from peft_cl.assets import default_backbone
from peft_cl.commands.digits import draw_digits_dataset


backbone = default_backbone()  # or "google/vit-base-patch16-224-in21k"
dataset = draw_digits_dataset()  # or load_dataset("uoft-cs/cifar100"), with label_column="fine_label" below

set_seed(0)
processor = AutoImageProcessor.from_pretrained(backbone)
model = get_peft_model(
    AutoModelForImageClassification.from_pretrained(backbone, dtype="float32"),
    CodaPromptConfig.from_preset("best"),  # prompts of the first task, and a head that forgets nothing; or "paper"
)
trainer = ContinualTrainer(
    model=model,
    args=ContinualTrainingArguments(
        "out/class_incremental",
        num_train_epochs=1,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=128,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
    ),
    scenario=class_incremental(dataset, num_tasks=5, label_column="label"),
    processing_class=processor,
)
trainer.train()  # the whole sequence: every task, then evaluation on all tasks seen
print(trainer.accuracy_matrix.round(2))
print(trainer.metrics)

# The adapter is a small file, and is used with stock PEFT on any copy of its backbone.
fresh = AutoModelForImageClassification.from_pretrained(backbone, dtype="float32")
model = PeftModel.from_pretrained(fresh, "out/class_incremental").eval()
example = dataset["test"][0]
with torch.no_grad():
    logits = model(**processor(example["image"], return_tensors="pt")).logits
print(f"digit {example['label']}, predicted {model.config.id2label[logits.argmax(-1).item()]}")
