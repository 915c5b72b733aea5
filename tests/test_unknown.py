"""Scores that tell images of classes never seen from others: against computations by hand, on adapters, and told by
the command."""

from __future__ import annotations

import doctest
import json
import shutil

import numpy as np
import pytest
import sklearn.metrics
import torch
import yaml
from cli_fixtures import pictures
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from tuner_cases import images, logits, prompted, task_names, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig
from peft_cl.assets import default_backbone
from peft_cl.cli import main
from peft_cl.heads import Sizes, make_head
from peft_cl.reliability import (
    ImageScorer,
    auroc,
    energy,
    false_positive_rate_at,
    gaussians_of,
    key_similarity,
    mahalanobis,
    max_probability,
    score_images,
    scores,
    separation,
)
from peft_cl.scenarios import ImageTransform


WIDTH, CLASSES = 6, 3


# ------------------------------------------------------------------------------------------------ by hand


def test_probability_and_energy_by_hand() -> None:
    rows = np.random.default_rng(0).normal(scale=3, size=(5, 4))
    rows[0, 1] = -np.inf  # a class that is out of the question
    rows[1, 2] = 60.0  # where float32 would say 1
    shares = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    np.testing.assert_allclose(max_probability(torch.tensor(rows)), shares.max(1), rtol=1e-12)
    np.testing.assert_allclose(energy(torch.tensor(rows)), np.log(np.exp(rows).sum(1)), rtol=1e-12)


@pytest.mark.parametrize("with_attention", [False, True])
def test_key_similarity_by_hand(with_attention) -> None:
    rng = np.random.default_rng(0)
    query, keys, attention = rng.normal(size=(5, 7)), rng.normal(size=(2, 4, 7)), rng.normal(size=(2, 4, 7))
    expected = []
    for q in query:
        of_sets = []
        for place, rows in enumerate(keys):
            asked = [q * weights if with_attention else q for weights in attention[place]]
            pairs = zip(asked, rows, strict=True)
            of_sets.append(max(a @ k / np.linalg.norm(a) / np.linalg.norm(k) for a, k in pairs))
        expected.append(np.mean(of_sets))
    query, keys, attention = (torch.tensor(each, dtype=torch.float32) for each in (query, keys, attention))
    found = key_similarity(query, keys, attention if with_attention else None)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def observed(name: str, options: dict, seed: int = 0):
    """A head of three classes, with the features, query and labels that it has observed."""
    torch.manual_seed(seed)
    labels = torch.arange(60) % CLASSES
    features, query = torch.randn(60, WIDTH) + labels[:, None], 3 * torch.randn(60, WIDTH) - labels[:, None]
    head = make_head(name, Sizes(WIDTH, WIDTH), 0, options)
    head.grow(CLASSES + 1, keep=0)  # the last class has no images
    head.observe(features, labels, query)
    head.fit()
    return head.eval(), features, query, labels


def squared_distances(learnt: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of `asked` from the class means of `learnt`, under the covariance within classes, (images, classes)."""
    means = np.stack([learnt[labels == label].mean(0) for label in range(CLASSES)])
    centered = learnt - means[labels]
    inverse = np.linalg.inv(centered.T @ centered / len(learnt))
    return np.array([[(each - mean) @ inverse @ (each - mean) for mean in means] for each in asked])


def test_mahalanobis_by_hand() -> None:
    head, features, _, labels = observed("lda", {"shrinkage": 0.0})
    asked = torch.randn(9, WIDTH)
    expected = -squared_distances(features.double().numpy(), labels.numpy(), asked.double().numpy()).min(1)
    np.testing.assert_allclose(mahalanobis(asked, gaussians_of(head)), expected, rtol=1e-5)


def test_distances_of_a_fusion_add_up_class_by_class() -> None:
    plain, weight = {"shrinkage": 0.0}, 0.5
    options = {"prompted": "lda", "prompted_options": plain, "query": "lda", "query_options": plain, "weight": weight}
    head, features, query, labels = observed("fusion", options)
    asked = torch.randn(9, WIDTH), torch.randn(9, WIDTH)
    parts = [
        squared_distances(learnt.double().numpy(), labels.numpy(), each.double().numpy())
        for learnt, each in zip((features, query), asked, strict=True)
    ]
    expected = -(parts[0] + weight * parts[1]).min(1)
    np.testing.assert_allclose(mahalanobis(asked[0], gaussians_of(head), asked[1]), expected, rtol=1e-5)
    assert len(gaussians_of(observed("fusion", {**options, "weight": 0})[0])) == 1


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("ridge", {}, 1),
        ("ridge", {"projection": 16}, 1),
        ("lda", {"by_class": True}, 1),
        ("aligned", {"samples": 4}, 1),
        ("fusion", {}, 1),  # the linear head of prompted features has no sums
        ("ncm", {}, 0),
    ],
)
def test_every_head_that_keeps_a_second_moment_has_gaussians(name, options, parts) -> None:
    head, features, query, _ = observed(name, options)
    found = gaussians_of(head)
    assert len(found) == parts
    if found:
        near, far = (mahalanobis(scale * features, found, scale * query).mean() for scale in (1, 50))
        assert far.isfinite() and far < near < 0


def test_examples_in_docstrings_are_true() -> None:
    found = doctest.testmod(scores)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_that_of_scikit_learn(ties) -> None:
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(0.5, 1, 80), rng.normal(0, 1, 50)
    if ties:
        known, unknown = known.round(), unknown.round()
    truth = np.r_[np.ones(80), np.zeros(50)]
    assert auroc(known, unknown) == pytest.approx(sklearn.metrics.roc_auc_score(truth, np.r_[known, unknown]))
    # The highest threshold that keeps 95 % of the known images, tried one by one.
    kept = [threshold for threshold in known if np.mean(known >= threshold) >= 0.95]
    assert false_positive_rate_at(known, unknown) == pytest.approx(np.mean(unknown >= max(kept)))


def test_scores_that_are_the_same_say_nothing() -> None:
    assert auroc([1.0, 1.0], [1.0, 1.0, 1.0]) == 0.5 and false_positive_rate_at([1.0, 1.0], [1.0]) == 1.0
    assert separation({"energy": [2, 3]}, {"energy": [0, 1]}) == {
        "energy": {"auroc": 1.0, "false_positive_rate_at_95": 0.0}
    }


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: auroc([], [1.0]), r"known_scores has the shape \(0,\), but must be one score an image. Give"),
        (lambda: auroc([1.0], [[1.0]]), r"unknown_scores has the shape \(1, 1\)"),
        (lambda: auroc([1.0, float("nan")], [1.0]), "known_scores has 1 scores that are not numbers.*Leave"),
        (lambda: false_positive_rate_at([1.0], [1.0], 0), "true_positive_rate is 0, but must be above 0 .* such as"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(call, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        call()


# ------------------------------------------------------------------------------------------------ adapters

SMALL = {"prompted": "lda", "prompted_options": {"shrinkage": 0.3}, "query_options": {"fourier": 8, "shrinkage": 0.3}}
FITTED = {
    "l2p": lambda: L2PConfig.from_preset("best", head_options=SMALL, pool_size=6, top_k=2, layers=[0, 1, 2]),
    "dualprompt": lambda: DualPromptConfig.from_preset("best", head_options=SMALL, g_layers=[0], layers=[1, 2]),
    "coda": lambda: CodaPromptConfig.from_preset("best", head_options=SMALL, components_per_task=2, layers=[0, 2]),
    "frozen": lambda: LinearProbeConfig.from_preset("best", head_options={"fourier": 8, "shrinkage": 0.3}),
}


def fitted(name: str) -> PeftModel:
    """An adapter of the preset "best" whose head has observed two tasks of three classes."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(), FITTED[name]())
    for task in range(2):
        model.begin_task(task_names(task))
        model.fit_head([{"pixel_values": images(12, seed=task) + task, "labels": torch.arange(12) % 3 + 3 * task}])
    return model.eval()


@pytest.mark.parametrize("name", FITTED)
def test_one_pass_gives_all_scores_of_an_adapter(name) -> None:
    model, calls = fitted(name), []
    pixels = images(5, seed=7)
    handle = model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    found = score_images(model, [{"pixel_values": pixels[:3]}, {"pixel_values": pixels[3:], "labels": None}])
    handle.remove()
    assert len(calls) == 2
    expected = {"max_probability", "energy", "mahalanobis"} | ({"key_similarity"} if name != "frozen" else set())
    assert set(found) == expected and all(values.shape == (5,) for values in found.values())
    own = logits(model, pixels).double()
    np.testing.assert_allclose(found["max_probability"], own.softmax(-1).amax(-1), atol=1e-5)
    np.testing.assert_allclose(found["energy"], own.logsumexp(-1), rtol=1e-4)
    features = model.base_model.features(pixels)
    np.testing.assert_allclose(
        found["mahalanobis"], mahalanobis(features[0], gaussians_of(model.head.active), features[1]), rtol=1e-4
    )


@pytest.mark.parametrize("name", ["l2p", "l2p-deep", "dualprompt", "dualprompt-coda", "coda"])
def test_keys_that_take_part_are_compared_with_the_query(name) -> None:
    model = prompted(name, tasks=2)
    pool, query = model.base_model.pool, model.base_model.query(images())
    keys, asked = (each.detach() for each in (pool.rows("keys") if pool.row_axes else pool.keys, query[None, :, None]))
    if getattr(pool, "attention", None) is not None:
        asked = asked * pool.rows("attention").detach()[:, None]  # (sets, B, rows, D)
    expected = torch.cosine_similarity(asked, keys[:, None], dim=-1).amax(-1).mean(0)
    np.testing.assert_allclose(
        score_images(model, [{"pixel_values": images()}])["key_similarity"], expected, atol=1e-5
    )


def test_rows_of_tasks_to_come_are_not_compared() -> None:
    model = prompted("l2p", tasks=1, use_prompt_mask=True)
    found = score_images(model, [{"pixel_values": images()}], ["key_similarity"])["key_similarity"]
    with torch.no_grad():
        model.base_model.pool.keys[:, 2:] = model.base_model.query(images())[:1, None].expand(1, 4, -1)
    again = score_images(model, [{"pixel_values": images()}], ["key_similarity"])["key_similarity"]
    np.testing.assert_array_equal(found, again)


def test_a_missing_score_is_left_out_or_refused() -> None:
    model = prompted("linear-probe")
    scorer = ImageScorer(model)
    assert scorer.scores == ("max_probability", "energy") and set(scorer.missing) == {"key_similarity", "mahalanobis"}
    assert "key_similarity" in ImageScorer(prompted("coda-layer-mean")).missing  # its query is made on the way
    for name, expected in (
        ("mahalanobis", r"'mahalanobis' is missing: its head \(linear\) keeps no sums .* 'lda'.* Leave it out"),
        ("key_similarity", "'key_similarity' is missing: the adapter has no keys .* Leave it out"),
        ("entropy", "scores has 'entropy', but must be of max_probability, energy, .* Correct"),
    ):
        with pytest.raises(ValueError, match=expected):
            ImageScorer(model, [name])
    with pytest.raises(ValueError, match="has learnt no classes yet.* Train it first"):
        ImageScorer(get_peft_model(tiny(), LinearProbeConfig()))
    with pytest.raises(ValueError, match="batches holds no images.* Give some"):
        score_images(model, [])


def test_sums_are_read_from_beside_the_adapter(tmp_path) -> None:
    model = fitted("frozen")
    expected = score_images(model, [{"pixel_values": images()}])
    model.save_pretrained(tmp_path)
    model.base_model.save_sums(tmp_path)
    again = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    found = score_images(again, [{"pixel_values": images()}])
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4)
    (tmp_path / "head_sums.safetensors").unlink()
    alone = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    assert "Copy that file there" in ImageScorer(alone).missing["mahalanobis"]


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def half(tmp_path_factory, place):
    """A folder with `data` of four colours, `two` and `others` of two each, and `run`: frozen features that learnt the
    two, on the embedded backbone."""
    folder = tmp_path_factory.mktemp("half")
    for name, kept in (("data", [0, 1, 2, 3]), ("two", [0, 1]), ("others", [2, 3])):
        (folder / name).mkdir()
        for split, *rows in (("train", 8, 0), ("test", 6, 1)):
            examples = pictures(*rows)
            rows = np.flatnonzero(np.isin(examples["label"], kept))
            examples.select(rows).to_parquet(folder / name / f"{split}.parquet")
    config = {
        "model": "vit-tiny-64",
        "method": "frozen",
        "adapter": {"head_options": {"shrinkage": 0.1}, "head_layers": 1},
        "dataset": str(folder / "two"),
        "scenario": {"num_tasks": 2},
        "training": {"use_cpu": True, "disable_tqdm": True, "pictures": False},
        "output_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder


def measured(capsys, *command: str) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_measures_images_of_other_classes(half, capsys) -> None:
    run = str(half / "run")
    found = measured(capsys, run, "--dataset", str(half / "two"), "--unknown", str(half / "others"))["unknown"]
    assert (found["images"], found["left_out"], found["split"]) == (12, 0, "test")
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(default_backbone()), run).eval()
    transform = ImageTransform(AutoImageProcessor.from_pretrained(run))
    found_here = [
        score_images(model, [{"pixel_values": transform(load_dataset(str(half / name))["test"]["image"][:])}])
        for name in ("two", "others")
    ]
    for name, values in separation(*found_here).items():
        assert found["scores"][name] == pytest.approx(values), name
    assert set(found["scores"]) == set(found_here[0]) and set(found["missing"]) == {"key_similarity"}
    assert found["scores"]["mahalanobis"]["auroc"] > 0.95  # colours that were never seen


def test_unknown_images_in_other_forms(half, tmp_path, capsys) -> None:
    run, data = str(half / "run"), str(half / "data")
    expected = measured(capsys, run, "--dataset", data, "--unknown", str(half / "others"))["unknown"]["scores"]
    # Of the data set that is measured on, the classes that were not learnt.
    found = measured(capsys, run, "--dataset", data, "--unknown", data)["unknown"]
    assert (found["images"], found["left_out"]) == (12, 12) and found["scores"] == expected
    # A folder of images, those in folders with the names of learnt classes left out.
    others = load_dataset(str(half / "others"))["test"]
    for number, image in enumerate(others["image"]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{number:02}.png")
    (tmp_path / "photos" / "red").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "red" / "0.png")
    found = measured(capsys, run, "--dataset", data, "--unknown", str(tmp_path / "photos"))["unknown"]
    assert (found["images"], found["left_out"], found["split"]) == (12, 1, None) and found["scores"] == expected
    assert main(["evaluate", run, "--dataset", data, "--unknown", str(tmp_path / "photos")]) == 0
    text = capsys.readouterr().out
    assert "classes never seen: 12 images of" in text and "(1 image of classes learnt left out)" in text
    assert f"mahalanobis      {100 * expected['mahalanobis']['auroc']:7.2f}%" in text
    assert "no key_similarity: the adapter has no keys" in text


def test_without_its_sums_an_adapter_has_the_other_scores(half, tmp_path, capsys) -> None:
    shutil.copytree(half / "run", tmp_path / "run", ignore=shutil.ignore_patterns("head_sums*", "_state"))
    words = ("--dataset", str(half / "two"), "--unknown", str(half / "others"))
    found = measured(capsys, str(tmp_path / "run"), *words)["unknown"]
    assert set(found["scores"]) == {"max_probability", "energy"} and "head_sums" in found["missing"]["mahalanobis"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two", "all of its images are of classes that the adapter has learnt (green, red). Give images of other"),
        ("nowhere", "There is no data set"),
        ("broken", "An image cannot be read"),
    ],
)
def test_what_is_not_unknown_is_refused(half, tmp_path, capsys, name, expected) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    places = {"broken": tmp_path / "broken", "nowhere": tmp_path / "nowhere"}
    command = ["evaluate", str(half / "run"), "--dataset", str(half / "two")]
    assert main([*command, "--unknown", str(places.get(name, half / name))]) == 2
    assert expected in capsys.readouterr().err
