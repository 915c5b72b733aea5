"""What `ContinualTrainer.predict` returns."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.trainer_utils import PredictionOutput


class NamedPredictions(PredictionOutput):
    """The Trainer's `PredictionOutput`, with the names of the classes predicted.

    `predictions` and `label_ids` are rows of the head, in the order in which classes were learnt, and not the label
    ids of the data, whose order is another: compare `names` with the data's names, or the two with each other.

    Attributes:
        predictions: Row of the head for each image, (images,).
        label_ids: Row of its true class, (images,); `None` for images without labels.
        metrics: As the Trainer has them; `test_accuracy` where there are labels.
        names: Name of the class predicted for each image, (images,).
    """

    names: list[str]

    @classmethod
    def of(cls, output: PredictionOutput, classes: Sequence[str]) -> NamedPredictions:
        """Add to the Trainer's output the names, of all `classes` in the order of the head's rows."""
        named = cls(*output)
        named.names = [classes[row] for row in output.predictions.tolist()]
        return named
