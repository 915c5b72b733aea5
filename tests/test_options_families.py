"""Options that read the backbone, on every family: early queries, rows from images, the order of tokens."""

from __future__ import annotations

import pytest
import torch
from backbone_cases import MAKERS, tiny_backbone
from peft import PeftModel, get_peft_model
from tuner_cases import images

from peft_cl import CodaPromptConfig, L2PConfig
from peft_cl.backbones import family_of


PREFIX = {"pool_size": 4, "prompt_length": 2, "top_k": 2, "prompt_type": "prefix", "head_type": "cls", "layers": [0]}
#: Relative positions have none for a prompt token.
NO_TOKENS = ("swin", "swinv2", "beit", "beit-shared")


def learnt(base, config):
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    for task in range(2):
        model.begin_task([f"{task} a", f"{task} b"])
        model.base_model.look_at(images(4, seed=task))
        model.train()
        labels = torch.tensor(model.peft_config["default"].tasks[-1])[torch.arange(4) % 2]
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1)
        model(pixel_values=images(4, seed=task), labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_early_queries_and_rows_from_images(name, tmp_path):
    base = tiny_backbone(name)
    model = learnt(
        base,
        L2PConfig(
            **PREFIX, query_layer=2 if name in NO_TOKENS else 0, init="patches", key_init="queries", growth="adaptive"
        ),
    )
    query, patches = model.base_model.looks_of(images())
    assert query.shape == (4, model.peft_config["default"].geometry.hidden_size)
    assert patches.ndim == 2 and len(patches) % 4 == 0
    tower = model.base_model.encoder.base_layer
    state = model.base_model.family.embed(tower, images(), False)[0]
    special = model.base_model.family.num_special(tower)
    torch.testing.assert_close(patches, state[:, special:].flatten(0, -2))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_backbone(name), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(images()).logits, model(images()).logits)
        cached = model(images(), query=model.base_model.query(images())).logits
    torch.testing.assert_close(cached, model(images()).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in NO_TOKENS])
def test_the_order_of_tokens_changes_no_logit(name):
    assert family_of(tiny_backbone(name)) is not None
    found = []
    for order in ("prompts_first", "cls_first"):
        config = CodaPromptConfig.from_preset("textbook", pool_size=4, query_source="layer_patches", token_order=order)
        model = learnt(tiny_backbone(name), config)
        with torch.no_grad():
            found.append(model(images()).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)
