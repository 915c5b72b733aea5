"""Abstaining below a threshold, and the task whose prompts the keys chose: by hand, in Python, told by the command."""

from __future__ import annotations

import csv
import doctest
import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification
from tuner_cases import config, images, logits, prompted

from peft_cl import classify
from peft_cl.cli import main
from peft_cl.reliability import (
    abstaining,
    accuracy_at_coverage,
    expert_tasks,
    kept_above,
    risk_coverage_curve,
    threshold_for_accuracy,
)


# ------------------------------------------------------------------------------------------------ by hand


def predictions(images: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, of which many are equal, and whether the predictions are right, the surer the more often."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1, images).round(1)
    return confidence, rng.uniform(size=images) < confidence


def test_what_is_kept_by_hand() -> None:
    confidence, correct = [0.9, 0.6, 0.6, 0.3], [True, False, True, False]
    assert kept_above(confidence, correct, 0.6) == (0.75, pytest.approx(2 / 3))  # at the threshold it is kept
    assert kept_above(confidence, correct, 0.61) == (0.25, 1.0)
    assert kept_above(confidence, correct, 0.0) == (1.0, 0.5)
    assert kept_above(confidence, correct, 0.95) == (0.0, None)


def test_examples_in_docstrings_are_true() -> None:
    found = doctest.testmod(abstaining)
    assert found.attempted and not found.failed


def test_the_curve_has_a_point_for_each_threshold() -> None:
    confidence, correct = predictions()
    curve = risk_coverage_curve(confidence, correct)
    assert list(curve.thresholds) == sorted(set(confidence), reverse=True) and curve.coverage[-1] == 1
    for threshold, coverage, risk in zip(curve.thresholds, curve.coverage, curve.risk, strict=True):
        kept = kept_above(confidence, correct, threshold)
        assert (coverage, risk) == (pytest.approx(kept.coverage), pytest.approx(1 - kept.accuracy))
    assert curve.area == pytest.approx(
        np.trapezoid(np.repeat(curve.risk, 2), np.repeat(np.r_[0, curve.coverage], 2)[1:-1])
    )
    assert risk_coverage_curve([0.9, 0.4], [True, True]).area == 0


@pytest.mark.parametrize("wanted", [0.5, 0.75, 0.9, 1.0])
def test_the_threshold_is_the_lowest_that_reaches_the_accuracy(wanted) -> None:
    confidence, correct = predictions()
    correct = correct | (confidence >= 1.0)  # so that 100 % is within reach
    found = threshold_for_accuracy(confidence, correct, wanted)
    assert kept_above(confidence, correct, found).accuracy >= wanted
    lower = [threshold for threshold in set(confidence) if threshold < found]
    assert all(kept_above(confidence, correct, threshold).accuracy < wanted for threshold in lower)


def test_accuracy_at_a_coverage_by_hand() -> None:
    confidence, correct = [0.9, 0.6, 0.6, 0.6, 0.3], [True, True, False, False, True]
    assert accuracy_at_coverage(confidence, correct, 0.2) == 1
    # One of three images of 0.6 is in the share: a third of them is right.
    assert accuracy_at_coverage(confidence, correct, 0.4) == pytest.approx((1 + 1 / 3) / 2)
    assert accuracy_at_coverage(confidence, correct, 1.0) == pytest.approx(3 / 5)
    order = np.random.default_rng(0).permutation(5)
    shuffled = [np.array(each)[order] for each in (confidence, correct)]
    assert accuracy_at_coverage(*shuffled, 0.4) == pytest.approx(2 / 3)
    assert (
        accuracy_at_coverage(np.arange(10) / 10, np.arange(10) > 0, 0.9) == 1
    )  # 9 images, whatever 0.9 * 10 rounds to


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: kept_above([], [], 0.5), r"shape \(0,\) and correct \(0,\).* Give as many of each"),
        (lambda: kept_above([0.5], [True, False], 0.5), r"shape \(1,\) and correct \(2,\)"),
        (lambda: risk_coverage_curve([float("nan")], [True]), "has 1 values that are not finite. Leave"),
        (lambda: risk_coverage_curve([0.5], [3]), "correct must be True or False.* Give"),
        (lambda: accuracy_at_coverage([0.5], [True], 0), "coverage is 0, but must be above 0 and at most 1, such as"),
        (lambda: threshold_for_accuracy([0.5], [True], 90), "accuracy is 90, but must be above 0 and at most 1"),
        (
            lambda: threshold_for_accuracy([0.9, 0.9, 0.4], [True, False, False], 0.8),
            "accuracy is 0.8, but no threshold .* best is 0.5000, at a threshold of 0.9000, which leaves 66.7 %",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(call, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        call()


# ------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize("case", ["dualprompt", "dualprompt-coda"])
def test_the_expert_of_an_image_is_that_of_the_nearest_key(case) -> None:
    model = prompted(case, tasks=3)
    logits(model)
    pool, query = model.base_model.pool, model.base_model.query(images())
    cosines = torch.cosine_similarity(query[None, :, None], pool.rows("keys")[:, None], dim=-1)  # (sets, B, tasks)
    chosen = cosines.argmax(-1).T
    expected = [max(range(3), key=lambda task: (row == task).sum().item()) for row in chosen]
    assert expert_tasks(model.base_model).tolist() == expected


def test_l2p_with_rows_of_tasks_has_experts_too() -> None:
    model = prompted("l2p", tasks=2, use_prompt_mask=True)  # rows 0 and 1 are of task 0, 2 and 3 of task 1
    logits(model)
    expected = [row.div(2, rounding_mode="floor").mode().values.item() for row in model.base_model.head.last_selected]
    assert expert_tasks(model.base_model).tolist() == expected


@pytest.mark.parametrize("case", ["l2p", "coda", "linear-probe", "dualprompt-general"])
def test_where_rows_say_no_task_there_is_none(case) -> None:
    model = prompted(case, tasks=2)
    logits(model)
    assert expert_tasks(model.base_model) is None
    frozen = prompted("dualprompt", tasks=2, train_prompts="first_task")
    logits(frozen)
    assert expert_tasks(frozen.base_model) is None


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def dual(place, tmp_path_factory) -> str:
    """A folder with a DualPrompt of two tasks on the model of `place`, noise for numbers."""
    folder = tmp_path_factory.mktemp("dual")
    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_pretrained(place / "model")
    model = get_peft_model(base, config("dualprompt", layers=[1]))
    for names in (["red", "green"], ["blue", "yellow"]):
        model.base_model.begin_task(names)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(place, tmp_path_factory) -> list[str]:
    """Files of eight images."""
    folder = tmp_path_factory.mktemp("photos")
    for row, image in enumerate(load_dataset(str(place / "data"))["test"]["image"][::3]):
        image.save(folder / f"{row}.png")
    return sorted(map(str, folder.glob("*.png")))


def in_python(place, folder: str, photos, **words):
    from peft_cl import open_image

    base = AutoModelForImageClassification.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, folder).eval()
    processor = AutoImageProcessor.from_pretrained(place / "model")
    return classify(model, [open_image(file, processor) for file in photos], processor, **words)


def test_a_prediction_below_the_threshold_is_a_guess(place, dual, photos, tmp_path, capsys) -> None:
    probabilities = sorted(found.probabilities[0] for found in in_python(place, dual, photos))
    threshold = str((probabilities[2] + probabilities[3]) / 2)  # three images are below it
    found = in_python(place, dual, photos, abstain_below=float(threshold))
    assert sum(each.abstains for each in found) == 3
    assert all(each.abstains == (each.probabilities[0] < float(threshold)) for each in found)
    assert not any(each.abstains for each in in_python(place, dual, photos))

    assert main(["predict", dual, *photos, "--abstain-below", threshold, "--top-k", "1"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    for file, block, each in zip(photos, blocks, found, strict=True):
        heading, guess = block.splitlines()
        assert heading == f"{file}  (task task_{each.task}; expert of task_{each.expert_task})" + (
            "  (abstains)" if each.abstains else ""
        )
        assert guess.endswith(each.names[0])

    table = str(tmp_path / "t.csv")
    assert main(["predict", dual, *photos, "--abstain-below", threshold, "--top-k", "1", "--csv", table]) == 0
    rows = list(csv.DictReader(open(table)))
    assert list(rows[0]) == ["file", "task", "expert_task", "abstains", "class_1", "probability_1"]
    assert [row["abstains"] for row in rows] == [str(each.abstains).lower() for each in found]
    assert [row["expert_task"] for row in rows] == [f"task_{each.expert_task}" for each in found]
    assert {row["class_1"] for row in rows if row["abstains"] == "true"} <= {"red", "green", "blue", "yellow"}


@pytest.mark.parametrize("threshold", ["0", "1", "50", "-0.5", "nan"])
def test_a_wrong_threshold_is_refused(dual, photos, capsys, threshold) -> None:
    assert main(["predict", dual, photos[0], f"--abstain-below={threshold}"]) == 2
    assert "but must be above 0 and below 1, such as 0.5." in capsys.readouterr().err


def test_a_wrong_threshold_is_refused_in_python(place, dual, photos) -> None:
    with pytest.raises(ValueError, match="abstain_below is 50, but must be above 0 and below 1, such as 0.5"):
        in_python(place, dual, photos[:1], abstain_below=50)


def test_accuracy_at_coverages_is_told(place, dual, capsys) -> None:
    command = ["evaluate", dual, "--dataset", str(place / "data"), "--coverage"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    data = load_dataset(str(place / "data"))["test"]
    names = [data.features["label"].names[label] for label in data["label"]]
    base = AutoModelForImageClassification.from_pretrained(place / "model")
    predicted = classify(
        PeftModel.from_pretrained(base, dual).eval(),
        data["image"][:],
        AutoImageProcessor.from_pretrained(place / "model"),
    )
    confidence = [each.probabilities[0] for each in predicted]
    correct = [each.names[0] == name for each, name in zip(predicted, names, strict=True)]
    expected = {str(share): accuracy_at_coverage(confidence, correct, share / 100) for share in (100, 90, 75, 50)}
    assert found["coverage"] == pytest.approx(expected) and found["coverage"]["100"] == pytest.approx(
        found["accuracy"]
    )
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "coverage  accuracy" in text and f"     75%  {100 * expected['75']:7.2f}%" in text
