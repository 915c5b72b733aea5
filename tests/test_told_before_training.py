"""Data and backbones that the first step would fail on are told before it, or work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from trainer_cases import CONFIGS

from peft_cl import CodaPromptConfig, LinearProbeConfig, class_incremental
from peft_cl.strategies import FineTuning
from peft_cl.tuners.base.digests import digest_of_weights


def transformed(data, function):
    return {split: examples.with_transform(function) for split, examples in data.items()}


def to_pixel_values(batch):
    return {"pixel_values": [torch.zeros(3, 32, 32) for _ in batch["image"]], "label": batch["label"]}


def to_tensors(batch):
    return {**batch, "image": [torch.from_numpy(np.asarray(image)) for image in batch["image"]]}


def failing(batch):
    return {**batch, "image": [image.no_such_method() for image in batch["image"]]}


def rotated(batch):
    return {**batch, "image": [image.rotate(5) for image in batch["image"]]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (to_pixel_values, r"makes the columns \['pixel_values', 'label'\].*images are needed in 'image'"),
        (to_tensors, "makes a Tensor of 'image' in the train examples of task 'task_0', but PIL images are needed"),
        (failing, "fails on the train examples of task 'task_0': AttributeError"),
    ],
)
def test_transforms_that_make_no_images(function, message, make_trainer, data):
    with pytest.raises(ValueError, match=message + r".*with_format\(None\)"):
        make_trainer(LinearProbeConfig(), scenario=class_incremental(transformed(data, function), 3))


def test_the_remedy_works(make_trainer, data):
    plain = {split: examples.with_format(None) for split, examples in transformed(data, to_tensors).items()}
    make_trainer(LinearProbeConfig(), scenario=class_incremental(plain, 3), num_train_epochs=1).train()
    images = class_incremental(transformed(data, rotated), 3)
    make_trainer(LinearProbeConfig(), scenario=images, num_train_epochs=1, folder="images").train()


@pytest.mark.parametrize("channels", [1, 4])
def test_a_backbone_of_other_channels(channels, make_trainer, tiny_vit):
    model = get_peft_model(tiny_vit(num_channels=channels), LinearProbeConfig())
    with pytest.raises(ValueError, match=f"reads images of {channels} channels, but images are given to it as RGB"):
        make_trainer(LinearProbeConfig(), model=model)


class Quantised(torch.Tensor):
    """Weights in 8 bits with a scale, as torchao keeps them: much that a tensor can do, they cannot."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values_, self.scale_ = values, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["values_", "scale_"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Quantised(parts["values_"], parts["scale_"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale_)
        if function not in (torch.ops.aten.t.default, torch.ops.aten.linear.default):
            raise NotImplementedError(f"no {function}")
        plain = [each.values_ * each.scale_ if isinstance(each, cls) else each for each in args]
        return function(*plain, **(kwargs or {}))


class TestQuantisedBackbones:
    @staticmethod
    def quantised(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(Quantised.of(module.weight.detach()), requires_grad=False)
        return model

    def test_a_digest_is_of_all_parts(self, tiny_vit):
        model = self.quantised(tiny_vit())
        before = digest_of_weights(model)
        assert before == digest_of_weights(self.quantised(tiny_vit()))
        next(each for each in model.modules() if isinstance(each, nn.Linear)).weight.scale_[0] *= 2
        assert before != digest_of_weights(model)

    @pytest.mark.parametrize(
        "config", [*CONFIGS.values(), lambda: CodaPromptConfig.from_preset("best", layers=[0, 1])]
    )
    def test_they_are_learnt_on(self, config, tiny_vit, make_trainer):
        base = tiny_vit()
        self.quantised(base.vit)
        trainer = make_trainer(None, model=get_peft_model(base, config()), num_train_epochs=1)
        trainer.train()
        assert trainer.finished_tasks == 3
        assert trainer.metrics["average_accuracy"] > 0.3

    def test_they_cannot_be_fine_tuned(self, tiny_vit, make_trainer):
        base = tiny_vit()
        self.quantised(base.vit)
        model = get_peft_model(base, LinearProbeConfig(train_mask=False))
        with pytest.raises(ValueError, match="The backbone's weights are quantised.*Load it without quantisation"):
            make_trainer(None, model=model, strategy=FineTuning())
