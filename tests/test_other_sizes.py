"""Images of another size than the backbone's: the configuration says that positions are interpolated."""

from __future__ import annotations

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from trainer_cases import CONFIGS
from transformers import ViTImageProcessorPil

from peft_cl import CodaPromptConfig, LinearProbeConfig


def sized(size):
    return ViTImageProcessorPil(size={"height": size, "width": size})


@pytest.mark.parametrize("method", CONFIGS)
def test_trained_saved_and_loaded_for_another_size(method, make_trainer, tiny_vit, tmp_path):
    config = CONFIGS[method]()
    config.interpolate_pos_encoding = True
    trainer = make_trainer(config, processing_class=sized(48), num_train_epochs=1)
    trainer.train()
    pixels = torch.randn(2, 3, 48, 48)
    loaded = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "run")).eval()
    assert torch.equal(loaded(pixels).logits, trainer.model.eval()(pixels).logits)
    assert torch.equal(loaded.base_model.query(pixels), loaded.base_model.query(pixels))
    # What a call says comes first.
    with pytest.raises(ValueError, match="size"):
        loaded(pixels, interpolate_pos_encoding=False)


def test_the_features_are_those_of_the_plain_model(tiny_vit):
    model = get_peft_model(tiny_vit(), LinearProbeConfig(interpolate_pos_encoding=True))
    model.begin_task(["a"])
    pixels = torch.randn(2, 3, 48, 48)
    expected = tiny_vit().vit(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(model.base_model.query(pixels), expected)


def test_without_it_the_trainer_says_how(make_trainer):
    with pytest.raises(
        ValueError, match="48 x 48 pixels, but the backbone reads 32 x 32.*interpolate_pos_encoding=True"
    ):
        make_trainer(LinearProbeConfig(), processing_class=sized(48))
    with pytest.raises(ValueError, match="44 x 44 pixels, but the backbone reads whole patches of 8 x 8"):
        make_trainer(LinearProbeConfig(interpolate_pos_encoding=True), processing_class=sized(44))


def test_earlier_versions_are_told_by_the_format(tmp_path):
    CodaPromptConfig(interpolate_pos_encoding=True).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).format_version == 2
    assert CodaPromptConfig().format_version == 1
