"""A loaded adapter compiled for inference: the same logits, and no compilation for each batch."""

from __future__ import annotations

import pytest
import torch
from tuner_cases import METHODS, images, logits, prompted


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", ["model", "layers"])
def test_logits_agree_and_batches_of_any_size_are_compiled_once(how, name):
    model, plain = prompted(name), prompted(name)
    if how == "model":
        model.get_base_model().compile()
    else:
        model.base_model.encoder.compile_layers()
    for count in (4, 1, 7, 2):
        torch.testing.assert_close(logits(model, images(count)), logits(plain, images(count)), atol=1e-4, rtol=1e-4)
    compiled = graphs()
    assert 0 < compiled <= (4 if how == "model" else 8)
    for count in (16, 3, 1, 9, 4):
        torch.testing.assert_close(logits(model, images(count)), logits(plain, images(count)), atol=1e-4, rtol=1e-4)
    assert graphs() == compiled


@pytest.mark.slow
def test_the_whole_peft_model_in_one_graph():
    model, plain = prompted("coda"), prompted("coda")
    model.compile(fullgraph=True, backend="aot_eager")
    for count in (4, 1, 7, 2):
        torch.testing.assert_close(logits(model, images(count)), logits(plain, images(count)), atol=1e-4, rtol=1e-4)
    assert graphs() <= 4 and not torch._dynamo.utils.counters["graph_break"]
