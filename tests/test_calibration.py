"""Temperature scaling: measures against computations by hand, the fit, and what becomes of it in model and record."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from tuner_cases import METHODS, begin, config, images, labels, logits, prompted, step, tiny

from peft_cl import L2PConfig, join_adapters
from peft_cl.plots import plot_reliability
from peft_cl.reliability import (
    calibrate,
    expected_calibration_error,
    fit_calibration,
    fit_temperature,
    negative_log_likelihood,
    reliability_bins,
)
from peft_cl.reliability.fitting import half_of_each_class


def drawn(scale: float = 3.0, rows: int = 4000, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `scale` times too sure of labels, which are drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    scores = 1.5 * rng.normal(size=(rows, classes))
    return scale * scores, (scores + rng.gumbel(size=scores.shape)).argmax(-1)


# ----------------------------------------------------------------------------------------------- measures


def test_bins_and_error_by_hand():
    probabilities = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.45, 0.55], [0.0, 1.0]]
    found = reliability_bins(probabilities, [0, 1, 0, 1, 0, 1], bins=5)
    # (0.4, 0.6]: 0.6 right, 0.55 wrong. (0.6, 0.8]: 0.8 wrong, 0.7 right. (0.8, 1]: 0.9 and 1 right.
    assert found.count == [0, 0, 2, 2, 2] and found.accuracy == [None, None, 0.5, 0.5, 1.0]
    assert found.confidence == [None, None, pytest.approx(0.575), pytest.approx(0.75), pytest.approx(0.95)]
    by_hand = (2 * 0.075 + 2 * 0.25 + 2 * 0.05) / 6
    assert expected_calibration_error(probabilities, [0, 1, 0, 1, 0, 1], bins=5) == pytest.approx(by_hand)


@pytest.mark.parametrize(("bins", "edge"), [(15, 3), (15, 15), (10, 7), (3, 1)])
def test_a_bin_has_its_upper_bound(bins, edge):
    """Also where rounding would say otherwise: 15 * 0.2 is more than 3."""
    confidence = edge / bins
    rest = [(1 - confidence) / 9] * 9 if confidence > 0.15 else []
    assert np.argmax(reliability_bins([[confidence, *rest]], [0], bins).count) == edge - 1
    above = np.nextafter(confidence, 2)
    if above < 1:
        assert np.argmax(reliability_bins([[above, *rest]], [0], bins).count) == edge


def test_error_against_sums_over_images():
    scores, truth = drawn()
    probabilities = torch.from_numpy(scores).softmax(-1)
    confidence, rows = probabilities.max(-1)
    gaps = torch.zeros(15, dtype=torch.float64)
    for sure, row, label in zip(confidence.tolist(), rows.tolist(), truth.tolist(), strict=True):
        gaps[math.ceil(sure * 15) - 1] += float(row == label) - sure
    expected = float(gaps.abs().sum() / len(truth))
    assert expected_calibration_error(probabilities, torch.from_numpy(truth)) == pytest.approx(expected)
    assert 0.15 < expected < 0.4  # the logits are too sure


def test_likelihood_is_the_cross_entropy():
    scores, truth = drawn(rows=50)
    expected = F.cross_entropy(torch.from_numpy(scores) / 2.5, torch.from_numpy(truth))
    assert negative_log_likelihood(scores, truth, 2.5) == pytest.approx(float(expected))
    scores[:, 0], truth = -np.inf, np.maximum(truth, 1)
    expected = F.cross_entropy(torch.from_numpy(scores[:, 1:]), torch.from_numpy(truth - 1))
    assert negative_log_likelihood(scores, truth) == pytest.approx(float(expected))


# ----------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_of_too_sure_logits_is_found(true):
    scores, truth = drawn(true, rows=20000)
    assert fit_temperature(scores, truth) == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("masked", [False, True])
def test_the_slope_is_zero_there(masked):
    scores, truth = drawn(rows=500)
    if masked:  # a class out of the question for each image, another than its own
        scores[np.arange(500), (truth + 1) % 6] = -np.inf
    found = fit_temperature(scores, truth)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(torch.from_numpy(scores) / math.exp(log_temperature), torch.from_numpy(truth)).item()

    slope = (loss(math.log(found) + 1e-4) - loss(math.log(found) - 1e-4)) / 2e-4
    assert abs(slope) < 1e-7
    assert loss(math.log(found)) < min(loss(math.log(found) + 0.1), loss(math.log(found) - 0.1), loss(0.0))


def test_tensors_of_any_format_and_a_shift_of_all_logits_change_nothing():
    scores, truth = drawn(rows=300)
    expected = fit_temperature(scores, truth)
    assert fit_temperature(torch.from_numpy(scores).requires_grad_(), torch.from_numpy(truth)) == expected
    assert fit_temperature(scores.tolist(), truth.tolist()) == expected
    assert fit_temperature(scores + 1e4, truth) == pytest.approx(expected, rel=1e-6)
    assert fit_temperature(torch.from_numpy(scores).bfloat16(), truth) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("scores", "truth", "expected"),
    [
        ([[2.0, 0.0], [0.0, 2.0]], [0, 1], 0.05),  # all right: the surer the better
        ([[2.0, 0.0], [0.0, 2.0]], [1, 0], 100.0),  # all wrong
        ([[2.0], [1.0]], [0, 0], 1.0),  # a single class: all the same
        ([[2.0, -math.inf], [-math.inf, 2.0]], [0, 1], 1.0),
    ],
)
def test_where_there_is_no_minimum(scores, truth, expected):
    assert fit_temperature(scores, truth) == expected


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        (np.empty((0, 3)), np.empty(0, int), r"logits has the shape \(0, 3\).*at least one of each"),
        ([1.0, 2.0], [0, 1], r"logits has the shape \(2,\).*must be numbers \(images, classes\)"),
        ([["a", "b"]], [0], "dtype <U1, but must be numbers"),
        ([[1.0, 2.0]], [0, 1], r"labels has the shape \(2,\).*must be whole numbers, one for each of the 1 images"),
        ([[1.0, 2.0]], [0.5], "labels has .*dtype float64, but must be whole numbers"),
        ([[1.0, 2.0]], [2], "labels reaches from 2 to 2, but logits has the classes 0 to 1. Give rows of the head"),
        ([[1.0, 2.0]], [-1], "labels reaches from -1"),
        ([[1.0, 2.0], [math.nan, 0.0]], [0, 0], r"NaN or \+inf for 1 images \(the first is image 1\).*Leave these"),
        ([[math.inf, 2.0]], [0], r"NaN or \+inf"),
        ([[-math.inf, 2.0]], [0], "labels has classes whose logit is -inf for 1 images.*Give the task"),
    ],
)
def test_bad_logits_are_refused(scores, truth, message):
    for function in (fit_temperature, negative_log_likelihood, fit_calibration):
        with pytest.raises(ValueError, match=message):
            function(scores, truth)


@pytest.mark.parametrize(
    ("probabilities", "bins", "message"),
    [
        ([[2.0, -1.0]], 15, "probabilities has rows that are negative or do not sum to 1.*by softmax"),
        ([[0.5, 0.4]], 15, "do not sum to 1"),
        ([[math.nan, 1.0]], 15, "must hold probabilities"),
        ([[0.5, 0.5]], 0, "bins is 0, but must be a whole number of at least 1"),
        ([[0.5, 0.5]], 2.5, "bins is 2.5"),
    ],
)
def test_bad_probabilities_are_refused(probabilities, bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(probabilities, [0], bins)


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_a_temperature_is_above_zero(temperature):
    with pytest.raises(ValueError, match=r"temperature is .*, but must be a number above 0"):
        negative_log_likelihood([[1.0, 2.0]], [0], temperature)
    with pytest.raises(ValueError, match=r"temperature is .*, but must be a number at least 0.001 and at most"):
        L2PConfig(temperature=temperature)


# ----------------------------------------------------------------------------------------------- before and after


def test_halves_have_half_of_each_class():
    truth = np.array([0] * 10 + [1] * 3 + [2] * 3 + [3])
    half = half_of_each_class(truth, 0)
    counts = np.bincount(truth[half], minlength=4)
    assert counts[0] == 5 and sorted(counts[1:3]) == [1, 2] and half.sum() == 9
    assert (half == half_of_each_class(truth, 0)).all() and (half != half_of_each_class(truth, 1)).any()


def test_the_other_half_is_measured():
    scores, truth = drawn(rows=400)
    found, half = fit_calibration(scores, truth, seed=3), half_of_each_class(truth, 3)
    assert found.temperature == fit_temperature(scores, truth) and found.images == 400 and found.held_out
    of_half = fit_temperature(scores[half], truth[half])
    rest = torch.from_numpy(scores[~half])
    for measures, temperature in ((found.before, 1.0), (found.after, of_half)):
        probabilities = (rest / temperature).softmax(-1)
        assert measures.nll == pytest.approx(negative_log_likelihood(rest, truth[~half], temperature))
        assert measures.ece == pytest.approx(expected_calibration_error(probabilities, truth[~half]))
        assert measures.accuracy == (rest.argmax(-1).numpy() == truth[~half]).mean() and measures.images == 200
    assert found.after.nll < found.before.nll and found.after.ece < found.before.ece


def test_all_images_may_be_measured():
    scores, truth = drawn(rows=400)
    found = fit_calibration(scores, truth, measure_on_half=False, bins=10)
    assert found.after.images == found.images == 400 and not found.held_out
    assert found.after.nll == negative_log_likelihood(scores, truth, found.temperature)
    assert len(found.after.bins.count) == 10


def test_one_image_has_no_halves():
    with pytest.raises(ValueError, match="There is 1 held-out image.*set measure_on_half to False"):
        fit_calibration([[1.0, 2.0]], [0])
    assert fit_calibration([[1.0, 2.0]], [0], measure_on_half=False).temperature == 100


def test_the_diagram_shows_the_bins(tmp_path):
    found = fit_calibration(*drawn(rows=400))
    figure = plot_reliability(found, "Mine", tmp_path / "reliability.png")
    before, after, counts, _ = figure.axes
    for axes, measures in ((before, found.before), (after, found.after)):
        heights = [bar.get_height() for bar in axes.patches]
        np.testing.assert_equal(heights, [np.nan if each is None else each for each in measures.bins.accuracy])
    assert [bar.get_height() for bar in counts.patches] == found.before.bins.count
    text = " ".join(each.get_text() for axes in figure.axes for each in axes.texts)
    assert f"calibration error {100 * found.before.ece:.1f}" in text.replace("\u00a0", " ")
    assert figure.get_suptitle() == "Mine" and "the other 200" in figure.get_supxlabel()
    assert (tmp_path / "reliability.png").stat().st_size > 10_000
    assert "other" not in plot_reliability(replace(found, images=200)).get_supxlabel()


# ----------------------------------------------------------------------------------------------- in a model


def at(model: PeftModel, temperature: float) -> PeftModel:
    model.peft_config["default"].temperature = temperature
    return model


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("more", [{}, {"task_evidence": 3.0}], ids=["plain", "evidence"])
def test_logits_are_divided_in_evaluation(name, more):
    model = prompted(name, **more)
    plain, known = logits(model), logits(model, task_ids=torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(logits(at(model, 2.5)), plain / 2.5)
    torch.testing.assert_close(logits(model, task_ids=torch.tensor([0, 1, 0, 1])), known / 2.5)  # -inf stays
    assert (logits(model).argmax(-1) == plain.argmax(-1)).all()
    with torch.no_grad(), model.disable_adapter():
        base = model(images()).logits
    with torch.no_grad(), at(model, 1.0).disable_adapter():
        torch.testing.assert_close(model(images()).logits, base, rtol=0, atol=0)


def test_the_loss_in_evaluation_is_of_these_logits():
    model = at(prompted("coda"), 0.5)
    truth = labels(model)
    with torch.no_grad():
        output = model(pixel_values=images(), labels=truth)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, truth))


@pytest.mark.parametrize("name", METHODS)
def test_training_is_the_same_at_any_temperature(name):
    torch.testing.assert_close(step(at(prompted(name), 7.0)), step(prompted(name)), rtol=0, atol=0)


def test_half_precision_is_divided_in_float32():
    """bfloat16 would round two logits to one, and the answer could be another class."""
    model = prompted("linear-probe")
    with torch.autocast("cpu", torch.bfloat16):
        plain, scaled = logits(model), logits(at(model, 1.3))
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, plain.float() / 1.3, rtol=0, atol=0)


def test_it_is_saved_in_a_format_that_says_so(tmp_path):
    model = prompted("l2p")
    model.save_pretrained(tmp_path / "plain")
    at(model, 2.0).save_pretrained(tmp_path / "scaled")
    plain, scaled = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("plain", "scaled")
    )
    assert plain["format_version"] < 3 == scaled["format_version"] and scaled["temperature"] == 2.0
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "scaled").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_another_task_puts_it_back_and_says_so_once(caplog):
    model = at(prompted("coda"), 1.7)
    for task in (2, 3):
        begin(model, task)
        assert model.peft_config["default"].temperature == 1.0
    said = [record.getMessage() for record in caplog.records if "temperature" in record.getMessage()]
    assert len(said) == 1 and "was 1.7" in said[0] and "Fit it anew" in said[0]


def test_other_changes_of_the_classes_put_it_back_too(caplog):
    def learnt(classes: list[int], seed: int) -> PeftModel:
        model = prompted("linear-probe", tasks=0, head="ncm")
        model.begin_task([f"class {row}" for row in classes])
        model.fit_head([{"pixel_values": images(seed=seed), "labels": torch.arange(4) % len(classes)}])
        return at(model, 2.0)

    model = learnt([0, 1, 2], 0)
    model.base_model.forget_classes(["class 1"])
    assert model.peft_config["default"].temperature == 1.0
    other = config("linear-probe", head="ncm")
    at(model, 2.0).add_adapter("other", other)
    model.set_adapter("other")
    model.begin_task(["class 7"])
    model.fit_head([{"pixel_values": images(seed=1), "labels": torch.zeros(4, dtype=torch.long)}])
    model.set_adapter("default")
    join_adapters(model, ["default", "other"], "both")
    assert model.peft_config["both"].temperature == 1.0
    assert sum("temperature was 2" in record.getMessage() for record in caplog.records) == 2


def held_out(model: PeftModel, count: int = 24) -> list[dict[str, torch.Tensor]]:
    """Batches of noise, and labels that the model is right about half of the time."""
    batches = [images(8, seed) for seed in range(count // 8)]
    rows = [logits(model, batch).argmax(-1) for batch in batches]
    classes = len(model.peft_config["default"].classes)
    wrong = torch.arange(8) % 2
    return [
        {"pixel_values": batch, "labels": (row + wrong) % classes} for batch, row in zip(batches, rows, strict=True)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_a_model_is_calibrated(name):
    model = prompted(name)
    batches = held_out(model)
    plain = torch.cat([logits(model, batch["pixel_values"]) for batch in batches])
    truth = torch.cat([batch["labels"] for batch in batches])
    at(model, 9.0).train()  # what it was before has no part in it
    found = calibrate(model, batches, measure_on_half=False)
    assert model.training and model.peft_config["default"].temperature == found.temperature
    assert found.temperature == pytest.approx(fit_temperature(plain, truth), rel=1e-4)
    assert found.before.accuracy == 0.5 and found.images == 24
    scaled = torch.cat([logits(model.eval(), batch["pixel_values"]) for batch in batches])
    assert found.after.nll == pytest.approx(float(F.cross_entropy(scaled, truth)), rel=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "There are no held-out images: batches is empty. Give"),
        ([{"pixel_values": images()}], "A batch has pixel_values, but must have pixel_values and labels"),
        ([{"pixel_values": images(), "labels": [0, 1, 2, 99]}], "reach"),
    ],
)
def test_what_cannot_be_fitted_leaves_the_temperature(batches, message):
    model = at(prompted("l2p"), 1.5)
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches)
    assert model.peft_config["default"].temperature == 1.5


def test_an_adapter_without_classes_is_not_calibrated():
    with pytest.raises(ValueError, match="has learnt no classes yet.*Train it first"):
        calibrate(prompted("l2p", tasks=0), [])


@pytest.mark.parametrize(
    ("truth", "temperature", "expected"),
    [
        ([0, 1], 1.0, "All 2 held-out images are predicted right.*the temperature stays 1. Give more images"),
        ([1, 0], 100.0, "The temperature is 100.0, the end of its range: for these 2 held-out images"),
    ],
)
def test_images_that_say_too_little_are_told_of(truth, temperature, expected, caplog):
    """Where all are right the likeliest temperature is 0, at which the next error would be made in full certainty."""
    assert fit_calibration([[2.0, 0.0], [0.0, 2.0]], truth, measure_on_half=False).temperature == temperature
    (said,) = [record.getMessage() for record in caplog.records if "temperature" in record.getMessage()]
    assert re.match(expected, said)
