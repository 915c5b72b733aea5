"""Ensembles at test time: top-1 to top-k against models that choose so many, several adapters against sums by hand."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification
from tuner_cases import CASES, config, images, labels, logits, prompted, tiny

from peft_cl import CodaPromptConfig
from peft_cl.cli import main
from peft_cl.reliability import AdapterEnsemble, ensemble_of_top_k
from peft_cl.scenarios import ImageTransform
from peft_cl.strategies.packnet import MASKS_FILE


# ------------------------------------------------------------------------------------------------ L2P

L2P = {
    "tokens": ("l2p", {}),
    "prefix": ("l2p++", {}),
    "keys of each layer": ("l2p-deep", {"keys_per_layer": True}),
    "prompt mask": ("l2p", {"use_prompt_mask": True}),
    "evidence": ("l2p++", {"task_evidence": 3.0}),
}


def choosing(model: PeftModel, k: int) -> PeftModel:
    """A copy of an L2P model that takes the `k` nearest of the rows that the model had."""
    other = copy.deepcopy(model)
    pool = other.base_model.pool
    rows, own = pool.rows_in_use, pool.config
    own.use_prompt_mask, own.top_k, own.pool_size = False, k, rows
    for name, axis in (("keys", -2), ("prompts", -3)):  # rows of tasks to come are gone
        setattr(pool, name, torch.nn.Parameter(getattr(pool, name).detach().narrow(axis, 0, rows)))
    return other


@pytest.mark.parametrize("name", L2P)
def test_l2p_averages_models_of_top_1_to_k(name) -> None:
    case, settings = L2P[name]
    model = prompted(case, tasks=2, **settings)
    if settings.get("task_evidence"):
        for number in range(2):
            model.base_model.head.active.evidence.task_queries[number] = torch.randn(24)
        model.base_model.head.active.evidence.task_counts += 1
    expected = torch.stack([logits(choosing(model, k)) for k in (1, 2, 3)]).mean(0)
    with ensemble_of_top_k(model, 3) as asked:
        found = logits(asked)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, logits(model), atol=1e-3)


def test_an_ensemble_does_the_query_pass_once() -> None:
    model, runs = prompted("l2p", tasks=2), []
    handle = model.base_model.encoder._layers[1].register_forward_hook(lambda *_: runs.append(1))
    with ensemble_of_top_k(model, 3):
        logits(model)
    handle.remove()
    assert len(runs) == 1 + 3


# ------------------------------------------------------------------------------------------------ DualPrompt


def with_expert(model: PeftModel, pixels: torch.Tensor, rank: int, product: bool) -> torch.Tensor:
    """Logits of one image (1, 3, H, W) under the expert whose key is the `rank`-th nearest, from 1, in each key set:
    its key is made the image's own query, the other keys its opposite."""
    other = copy.deepcopy(model)
    pool, query = other.base_model.pool, other.base_model.query(pixels)
    keys = pool.rows("keys").detach()
    similarity = keys @ query[0] if product else torch.cosine_similarity(keys, query[:, None], dim=-1)  # (sets, rows)
    chosen = similarity.argsort(dim=-1, descending=True)[:, rank - 1]
    signs = torch.full(keys.shape[:2], -1.0).scatter(1, chosen[:, None], 1.0)
    forced, past = signs[..., None] * query, pool.past_keys.shape[1]
    with torch.no_grad():
        pool.past_keys.copy_(forced[:, :past])
        pool.keys.copy_(forced[:, past:])
    return logits(other, pixels)


@pytest.mark.parametrize(
    ("case", "settings"),
    [("dualprompt", {}), ("dualprompt-coda", {}), ("dualprompt", {"similarity": "dot"})],
)
def test_dualprompt_averages_its_k_best_experts(case, settings) -> None:
    model, product = prompted(case, tasks=3, **settings), bool(settings)
    with torch.no_grad():
        model.base_model.pool.past_keys[:, 0] *= 5  # a key that wins products by its length
    for pixels in images().split(1):
        expected = torch.stack([with_expert(model, pixels, rank, product) for rank in (1, 2)]).mean(0)
        with ensemble_of_top_k(model, 2):
            torch.testing.assert_close(logits(model, pixels), expected, atol=1e-5, rtol=1e-4)
    with ensemble_of_top_k(model, 1):
        alone = logits(model)
    torch.testing.assert_close(alone, logits(model))


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("case", ["l2p", "l2p-deep", "dualprompt"])
def test_the_model_is_as_it_was_afterwards(case, tmp_path) -> None:
    model = prompted(case, tasks=2)
    model.save_pretrained(tmp_path)  # notes the backbone's weights in the configuration
    before, settings = logits(model), model.peft_config["default"].to_dict()
    with ensemble_of_top_k(model, 2):
        inside = logits(model)
        model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == settings and "forward" not in vars(model.get_base_model())
    assert json.loads((tmp_path / "adapter_config.json").read_text()).get("top_k") == settings.get("top_k")
    with pytest.raises(ValueError, match="channel"), ensemble_of_top_k(model, 2):
        model(pixel_values=images()[:, :1])
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert not torch.equal(inside, before)
    model.train()(pixel_values=images(), labels=labels(model)).loss.backward()  # it learns on


def test_masks_losses_and_tuples_are_those_of_the_mean() -> None:
    model, tasks = prompted("l2p", tasks=2), torch.tensor([0, 1, 0, 1])
    truth = torch.tensor([0, 3, 1, 5])
    with ensemble_of_top_k(model, 2), torch.no_grad():
        mean = logits(model)
        masked = model(pixel_values=images(), task_ids=tasks, labels=truth)
        assert torch.equal(model(pixel_values=images(), return_dict=False)[0], mean)
    assert torch.equal(masked.logits[0, :3], mean[0, :3]) and masked.logits[0, 3:].isneginf().all()
    assert masked.loss.item() == pytest.approx(F.cross_entropy(masked.logits, truth).item())


def test_a_task_that_is_known_leaves_no_choice() -> None:
    model, tasks = prompted("dualprompt", tasks=2, known_task_rows=True), torch.tensor([0, 1, 0, 1])
    alone = logits(model, task_ids=tasks)
    with ensemble_of_top_k(model, 2):
        assert torch.equal(logits(model, task_ids=tasks), alone)
        assert not torch.allclose(logits(model), alone)


@pytest.mark.parametrize(
    "case", [name for name in CASES if name.startswith(("coda", "linear"))] + ["dualprompt-general"]
)
def test_without_a_choice_by_rank_there_is_no_ensemble(case) -> None:
    model = prompted(case)
    with pytest.raises(
        ValueError, match="top-1 to top-2 is of methods that choose .* Use it as it is, or an ensemble of"
    ):
        with ensemble_of_top_k(model, 2):
            pass
    assert logits(model).isfinite().all()  # the remedy


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (7, "k is 7, but the choice is among 6 rows of the adapter's pool. Give at most 6."),
        (0, "k is 0, but must be a whole number of at least 1"),
        (1.5, "k is 1.5, but must be a whole number"),
    ],
)
def test_a_wrong_k_is_refused(k, expected) -> None:
    with pytest.raises(ValueError, match=expected), ensemble_of_top_k(prompted("l2p"), k):
        pass


def test_an_ensemble_is_not_trained() -> None:
    model = prompted("l2p").train()
    with pytest.raises(ValueError, match=r"training mode.* Call model.eval\(\)"), ensemble_of_top_k(model, 2):
        model(pixel_values=images(), labels=labels(model))
    model(pixel_values=images(), labels=labels(model)).loss.backward()


# ------------------------------------------------------------------------------------------------ adapters


def two(first: list[list[str]], second: list[list[str]]) -> PeftModel:
    """A model with the adapters "first" and "second", which have learnt these tasks."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(), config("coda"), adapter_name="first")
    model.add_adapter("second", config("coda"))
    for name, tasks in (("first", first), ("second", second)):
        model.set_adapter(name)
        for classes in tasks:
            model.base_model.begin_task(classes)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
    model.set_adapter("first")
    return model.eval()


def probabilities(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Class name -> (B,)."""
    active = model.active_adapter
    model.set_adapter(name)
    found = dict(zip(model.peft_config[name].classes, logits(model).softmax(-1).T, strict=True))
    model.set_adapter(active)
    return found


@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ([3, 1], (0.75, 0.25))])
def test_probabilities_are_averaged_by_the_names_of_classes(weights, shares) -> None:
    model = two([["cat", "dog"], ["owl"]], [["owl", "fox"], ["cat"]])
    ensemble = AdapterEnsemble(model, ["first", "second"], weights)
    assert ensemble.classes == ["cat", "dog", "owl", "fox"]
    found = logits(ensemble).exp()
    first, second = (probabilities(model, name) for name in ("first", "second"))
    nothing = torch.zeros(len(images()))
    for column, name in enumerate(ensemble.classes):
        expected = shares[0] * first.get(name, nothing) + shares[1] * second.get(name, nothing)
        torch.testing.assert_close(found[:, column], expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(images())))
    torch.testing.assert_close(logits(ensemble).softmax(-1), found)


def test_an_ensemble_leaves_the_model_as_it_was() -> None:
    model = two([["cat", "dog"]], [["cat", "dog"]])
    model.set_adapter("second")
    model.train()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    labels_before = dict(model.config.id2label)
    found = logits(AdapterEnsemble(model, ["first", "second"]))
    assert model.active_adapter == "second" and model.training and model.config.id2label == labels_before
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained
    torch.testing.assert_close(found, logits(AdapterEnsemble(model.eval(), ["first", "second"])))


def test_a_known_task_counts_where_it_means_the_same() -> None:
    same = two([["cat", "dog"], ["owl"]], [["dog", "cat"], ["owl"]])
    found = logits(AdapterEnsemble(same, ["first", "second"]), task_ids=torch.tensor([0, 1, 0, 1]))
    assert torch.equal(found.exp().ceil(), torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1]]))
    other = AdapterEnsemble(two([["cat"], ["dog"]], [["dog"], ["cat"]]), ["first", "second"])
    with pytest.raises(
        ValueError, match="tasks of 'second' have other classes than those of 'first'.* Leave task_ids"
    ):
        logits(other, task_ids=torch.tensor([0, 0, 1, 1]))
    assert logits(other).shape == (4, 2)  # the remedy


@pytest.mark.parametrize(
    ("adapters", "weights", "expected"),
    [
        (["first", "third"], None, r"adapters is \['first', 'third'\], but must be .* \['first', 'second', 'empty'\]"),
        (["first", "first"], None, "different names of adapters that the model holds"),
        ([], None, "Load others by load_adapter"),
        (["first", "empty"], None, "'empty' has learnt no classes yet. Train it first"),
        (["first", "second"], [1], "weights is .*number for each of 2 adapters.* Leave it out"),
        (["first", "second"], [0, 0], "not all 0"),
        (["first", "second"], [-1, 2], "weights is -1, but must be a number at least 0"),
        (["first", "second"], [float("nan"), 2], "weights is nan"),
    ],
)
def test_what_is_no_ensemble_is_refused(adapters, weights, expected) -> None:
    model = two([["cat"]], [["cat"]])
    model.add_adapter("empty", CodaPromptConfig(components_per_task=2, prompt_length=4, layers=[0, 2]))
    with pytest.raises(ValueError, match=expected):
        AdapterEnsemble(model, adapters, weights)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def saved(place, tmp_path_factory):
    """Adapters in folders `l2p`, `first` and `second` (CODA-Prompt) on the model of `place`, noise for numbers."""
    folder = tmp_path_factory.mktemp("saved")
    classes = {"first": [["red", "green"], ["blue", "yellow"]], "second": [["blue", "red"], ["green", "yellow"]]}
    for seed, (name, case) in enumerate((("l2p", "l2p"), ("first", "coda"), ("second", "coda"))):
        torch.manual_seed(seed)
        base = AutoModelForImageClassification.from_pretrained(place / "model")
        layers = {} if case == "l2p" else {"layers": [0, 1]}
        model = get_peft_model(base, config(case, **layers))
        for task in classes.get(name, classes["first"]):
            model.base_model.begin_task(task)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


def measured(capsys, *command: str) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_asks_ensembles(saved, place, capsys) -> None:
    data, words = load_dataset(str(place / "data"))["test"], ("--dataset", str(place / "data"))
    pixels = ImageTransform(AutoImageProcessor.from_pretrained(place / "model"))(data["image"][:])
    truth = [data.features["label"].names[label] for label in data["label"]]

    def load(name: str) -> PeftModel:
        base = AutoModelForImageClassification.from_pretrained(place / "model")
        return PeftModel.from_pretrained(base, str(saved / name)).eval()

    def accuracy(model: torch.nn.Module, classes: list[str]) -> float:
        rows = logits(model, pixels).argmax(-1).tolist()
        return sum(classes[row] == name for row, name in zip(rows, truth, strict=True)) / len(truth)

    model = load("l2p")
    with ensemble_of_top_k(model, 3):
        expected = accuracy(model, model.peft_config["default"].classes)
    found = measured(capsys, str(saved / "l2p"), *words, "--ensemble-top-k", "3")
    assert found["accuracy"] == pytest.approx(expected) and found["ensemble"] == "top-1 to top-3"
    alone = measured(capsys, str(saved / "l2p"), *words)
    assert alone["ensemble"] is None and set(found) == set(alone) and found["tasks"].keys() == alone["tasks"].keys()

    model = load("first")
    model.load_adapter(str(saved / "second"), "second")
    ensemble = AdapterEnsemble(model, ["default", "second"])
    (saved / "photos").mkdir()
    data[0]["image"].save(saved / "photos" / "1.png")
    others = ("--with", str(saved / "second"), "--unknown", str(saved / "photos"))
    found = measured(capsys, str(saved / "first"), *words, *others)
    assert found["accuracy"] == pytest.approx(accuracy(ensemble, ensemble.classes))
    assert found["ensemble"] == f"with {saved / 'second'}" and list(found["tasks"]) == ["task_0", "task_1"]
    assert set(found["unknown"]["scores"]) == {"max_probability"}


def test_adapters_that_do_not_fit_are_refused(saved, place, tmp_path, capsys) -> None:
    words = ("--dataset", str(place / "data"))
    moved, networks = (shutil.copytree(saved / "first", tmp_path / name) for name in ("moved", "networks"))
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "other/model"}))
    (networks / MASKS_FILE).touch()
    photo = tmp_path / "photos"
    photo.mkdir()
    load_dataset(str(place / "data"))["test"][0]["image"].save(photo / "1.png")
    for command, expected in (
        ((str(saved / "first"), "--with", str(moved)), "was learnt on 'other/model', but"),
        ((str(networks), "--with", str(saved / "first")), "holds a network for each task, so it is no member"),
        ((str(networks), "--ensemble-top-k", "2"), "Leave --ensemble-top-k out"),
        ((str(networks), "--unknown", str(photo)), "holds a network for each task, and none for images of no task"),
        ((str(saved / "first"), "--with", str(saved / "l2p")), "is of L2P, but"),
        ((str(saved / "first"), "--ensemble-top-k", "2"), "--ensemble-top-k is 2, which cannot be done: An ensemble"),
        ((str(saved / "l2p"), "--ensemble-top-k", "9"), "k is 9, but the choice is among 6 rows"),
    ):
        assert main(["evaluate", *command, *words]) == 2
        assert expected in capsys.readouterr().err
    words = (*words, "--model", str(place / "model"))  # the remedy
    assert main(["evaluate", str(saved / "first"), "--with", str(moved), *words]) == 0
