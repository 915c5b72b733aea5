"""CLIP and SigLIP with texts: zero-shot before the first image, classes added by name, and statistics beside it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from backbone_cases import TOWER, tiny_backbone
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
)
from tuner_cases import images, logits

from peft_cl import CodaPromptConfig, LinearProbeConfig
from peft_cl.heads.text_tower import TextTower


NAMES = ["cat", "dog", "blue bird", "tree"]
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(request, tmp_path_factory) -> str:
    """A random model with two towers and a tokenizer of single letters, saved as on the Hub."""
    folder = tmp_path_factory.mktemp(request.param)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    folder.joinpath("vocab.json").write_text(json.dumps(vocabulary))
    folder.joinpath("merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    begin, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = {**TEXT, "vocab_size": len(words), "max_position_embeddings": 32, "bos_token_id": begin}
    text |= {"eos_token_id": end, "pad_token_id": end}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.param == "clip":
            config = CLIPConfig(text_config=text, vision_config={**TOWER, "initializer_range": 0.3}, projection_dim=8)
            model = CLIPModel(config)
        else:
            model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 24}, vision_config=TOWER))
            torch.nn.init.constant_(model.logit_bias, -0.7)
            torch.nn.init.constant_(model.logit_scale, 1.3)
    model.save_pretrained(folder)
    return str(folder)


def base_of(checkpoint: str) -> torch.nn.Module:
    return AutoModelForImageClassification.from_pretrained(checkpoint, num_labels=4).eval()


def zero_shot(checkpoint: str, names: list[str], template: str = "a photo of a {}.") -> torch.Tensor:
    """What the model with both towers says."""
    model, tokenizer = AutoModel.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    padding = "max_length" if model.config.model_type == "siglip" else True
    texts = [template.format(name) for name in names]
    tokens = tokenizer(texts, padding=padding, max_length=32, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, pixel_values=images()).logits_per_image


def test_before_any_image_it_is_the_zero_shot_classifier(checkpoint):
    model = get_peft_model(base_of(checkpoint), LinearProbeConfig(head="text")).eval()
    model.begin_task(NAMES[:2])
    torch.testing.assert_close(logits(model), zero_shot(checkpoint, NAMES[:2]), rtol=1e-4, atol=1e-4)
    model.begin_task(NAMES[2:])  # by name alone
    torch.testing.assert_close(logits(model), zero_shot(checkpoint, NAMES), rtol=1e-4, atol=1e-4)


def test_templates_are_averaged(checkpoint):
    templates = ["a photo of a {}.", "a drawing of a {}."]
    options = {"templates": templates}
    model = get_peft_model(base_of(checkpoint), LinearProbeConfig(head="text", head_options=options)).eval()
    model.begin_task(NAMES)
    head = model.base_model.head.active
    parts = []
    for template in templates:
        single = get_peft_model(
            base_of(checkpoint), LinearProbeConfig(head="text", head_options={"templates": [template]})
        )
        single.begin_task(NAMES)
        parts.append(single.base_model.head.active.embeddings)
    expected = torch.nn.functional.normalize(sum(parts) / 2, dim=-1)
    torch.testing.assert_close(head.embeddings, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [0, 3])
def test_prompts_and_context_are_learnt_under_it(checkpoint, context, tmp_path, monkeypatch):
    config = CodaPromptConfig(
        components_per_task=2,
        prompt_length=4,
        layers="all",
        head="text",
        head_options={"context": context, "templates": ["{}"]},
    )
    model = get_peft_model(base_of(checkpoint), config)
    model.begin_task(NAMES[:3])
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert any("context" in name for name in trained) == bool(context)
    optimizer = torch.optim.Adam(trained.values(), lr=0.03)
    labels, losses = torch.tensor([0, 1, 2, 0]), []
    for _ in range(15):
        model.train()
        loss = model(pixel_values=images(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    answers = logits(model.eval())
    model.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:  # predicting needs no text tower
        patch.setattr(TextTower, "load", lambda checkpoint: pytest.fail("the text tower was loaded"))
        loaded = PeftModel.from_pretrained(base_of(checkpoint), tmp_path)
        torch.testing.assert_close(logits(loaded), answers, rtol=1e-4, atol=1e-4)
    copied = pickle.loads(pickle.dumps(loaded))
    torch.testing.assert_close(logits(copied), answers, rtol=1e-4, atol=1e-4)
    # Interrupted in the task: the context goes on without another begin.
    resumed = PeftModel.from_pretrained(base_of(checkpoint), tmp_path, is_trainable=True).train()
    resumed(pixel_values=images(), labels=labels).loss.backward()
    torch.testing.assert_close(logits(resumed.eval()), answers, rtol=1e-4, atol=1e-4)
    goes_on = PeftModel.from_pretrained(base_of(checkpoint), tmp_path, is_trainable=True)
    goes_on.begin_task(NAMES[3:])
    before, after = (each.base_model.head.active.embeddings for each in (loaded, goes_on.eval()))
    torch.testing.assert_close(after[:3], before, rtol=1e-4, atol=1e-5)
    assert logits(goes_on).shape == (4, 4)


def test_statistics_beside_the_names(checkpoint, tmp_path):
    """Zero-shot logits and LDA of what was seen: one adds to the other, and the classes keep what they had."""
    options = {"prompted": "text", "query": "lda", "weight": 2.0}
    config = LinearProbeConfig(head="fusion", head_options=options, head_features="cls+mean")
    model = get_peft_model(base_of(checkpoint), config).eval()
    shown, labels = images(40), torch.arange(40) % 4
    model.begin_task(NAMES)
    model.fit_head([{"pixel_values": shown, "labels": labels}])
    head, answers = model.base_model.head.active, logits(model)
    lda = get_peft_model(base_of(checkpoint), LinearProbeConfig(head="lda", head_features="cls+mean")).eval()
    lda.begin_task(NAMES)
    lda.fit_head([{"pixel_values": shown, "labels": labels}])
    expected = zero_shot(checkpoint, NAMES).log_softmax(-1) + 2 * logits(lda)
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-3)
    assert head.prompted.classes == 4
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base_of(checkpoint), tmp_path)), answers, rtol=1e-4, atol=1e-4
    )


def test_what_does_not_go_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="head is 'text', but a ViTForImageClassification was not trained with texts"):
        get_peft_model(tiny_backbone("vit"), LinearProbeConfig(head="text"))
    with pytest.raises(ValueError, match=r"templates is \['a photo'\], but must be a list of texts with {}"):
        LinearProbeConfig(head="text", head_options={"templates": ["a photo"]})
    with pytest.raises(ValueError, match="head_features is 'mean', but head='text' reads 'cls'.*'cls\\+mean'"):
        LinearProbeConfig(head="text", head_features="mean")
    with pytest.raises(ValueError, match="context is -1, but must be a whole number"):
        LinearProbeConfig(head="text", head_options={"context": -1})
    missing = str(Path(tmp_path, "nothing"))
    with pytest.raises(ValueError, match="whose class names are embedded by the text tower of .*nothing"):
        get_peft_model(base_of(checkpoint), LinearProbeConfig(head="text", head_options={"checkpoint": missing}))
    with pytest.raises(ValueError, match="is of model_type 'vit', which has no text tower"):
        tiny_backbone("vit").save_pretrained(tmp_path)
        get_peft_model(base_of(checkpoint), LinearProbeConfig(head="text", head_options={"checkpoint": str(tmp_path)}))
