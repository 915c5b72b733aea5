"""What the tests of metrics of the user's own share."""

from __future__ import annotations

import pytest
from transformers import EvalPrediction

from peft_cl import LinearProbeConfig
from peft_cl.metrics import confusion_matrix, f1, top_k_accuracy


READY_MADE = [top_k_accuracy(2), f1(), confusion_matrix()]
NAMES = {"top_2_accuracy", "macro_f1", "confusion_matrix"}


def accuracy(prediction: EvalPrediction) -> float:
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


class Spy:
    """Keeps what it is called with, and gives the accuracy under a name of its own."""

    def __init__(self):
        self.calls: list[EvalPrediction] = []

    def __call__(self, prediction: EvalPrediction) -> dict:
        self.calls.append(prediction)
        return {"spied": accuracy(prediction)}


@pytest.fixture(name="run")
def make_run(make_trainer):
    """`run(functions, ...)`: a trainer of a linear probe that has learnt its tasks."""

    def train(functions, config=None, **words):
        trainer = make_trainer(config or LinearProbeConfig(), compute_metrics=functions, **words)
        trainer.train()
        return trainer

    return train
