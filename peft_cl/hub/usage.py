"""The part of a card that shows how to use the adapter."""

from __future__ import annotations

from ..text import literal
from .sources import Source


#: Files of an image processor, any of which is one.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
#: What stands for an adapter that has no name yet.
UNNAMED = "path/to/adapter"
NAME_LETTERS = 300  # of a name in the usage example; those of the Hub have 96 at most


def usage(backbone: Source, adapter: str, has_processor: bool) -> str:
    if backbone.is_embedded:
        imports, base = "from peft_cl.assets import default_backbone\n", "default_backbone()"
    else:
        is_elsewhere = backbone.is_local or not backbone.name
        name = backbone.name[:NAME_LETTERS]
        base = literal(f"path/to/{name or 'backbone'}" if is_elsewhere else name)
        imports = ""
    adapter = literal(adapter[:NAME_LETTERS])
    processor = adapter if has_processor else base
    return f"""## How to use

`pip install peft-cl`, then:

```python
import torch
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

import peft_cl  # makes the method known to PEFT
{imports}
base = AutoModelForImageClassification.from_pretrained({base}, dtype="float32")
model = PeftModel.from_pretrained(base, {adapter}).eval()
processor = AutoImageProcessor.from_pretrained({processor})

image = peft_cl.open_image("image.jpg", processor)  # as in training, whatever its mode
with torch.no_grad():
    logits = model(**processor(image, return_tensors="pt")).logits
print(model.config.id2label[logits.argmax(-1).item()])
```"""
