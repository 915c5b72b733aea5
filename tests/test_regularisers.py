"""The terms that hold rows apart: each by its formula, its gradient by finite differences, and one by one in logs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tuner_cases import images, labels, step, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig
from peft_cl.backbones import Geometry
from peft_cl.tuners.base.pair_sums import FORMS
from peft_cl.tuners.base.row_pool import ALIKE, UNLIKE
from peft_cl.tuners.coda.pool import CodaPromptPool
from peft_cl.tuners.dualprompt.pool import DualPromptPool
from peft_cl.tuners.l2p.pool import L2PPool


SHAPE = Geometry(8, 3)
L2P = (
    L2PPool,
    L2PConfig,
    {"pool_size": 4, "prompt_length": 4, "top_k": 2, "prompt_type": "prefix", "head_type": "cls"},
)
DEEP = (L2PPool, L2PConfig, {**L2P[2], "layers": [0, 1, 2], "keys_per_layer": True})
EXPERTS = (DualPromptPool, DualPromptConfig, {"pool_size": 4, "prompt_length": 2, "layers": [0, 1], "g_layers": [2]})
BY_KEY = (DualPromptPool, DualPromptConfig, {**EXPERTS[2], "expert_choice": "key"})
CODA = (CodaPromptPool, CodaPromptConfig, {"components_per_task": 2, "prompt_length": 2, "layers": [0, 1]})
SHARED = (CodaPromptPool, CodaPromptConfig, {**CODA[2], "components_per_task": None, "pool_size": 4})
ALL = {"l2p": L2P, "deep": DEEP, "experts": EXPERTS, "by-key": BY_KEY, "coda": CODA, "shared": SHARED}


def pool_of(name, tasks=3, **more):
    """A pool in training after some tasks, its rows noise."""
    torch.manual_seed(0)
    pool_class, config_class, fields = ALL[name]
    config = config_class(**fields, **more)
    config.tasks = [[0]]
    pool = pool_class(config, SHAPE)
    for task in range(tasks):
        if task:
            config.tasks = [*config.tasks, [task]]
            pool.begin_task(task)
        with torch.no_grad():
            for parameter in pool.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return pool.train()


def all_rows(pool):
    """Prompts of each layer, (layers, rows, numbers), written out."""
    found = []
    rows = pool.rows("prompts")
    for layer in rows:
        count = layer.shape[-3]
        found.append(
            torch.stack([torch.cat([part.flatten() for part in layer[..., [row], :, :]]) for row in range(count)])
        )
    return torch.stack(found)


def orthogonality(rows, form):
    """The four forms, as the specification writes them, over the rows (layers, n, numbers)."""
    total = 0.0
    for layer in rows:
        n = len(layer)
        for i in range(n):
            for j in range(n):
                product = layer[i] @ layer[j]
                if form == "gram":
                    total = total + (product - float(i == j)) ** 2 / n**2
                elif form == "pairwise" and i != j:
                    total = total + (product / layer[i].norm() / layer[j].norm()).abs() / len(rows)
                elif form == "products" and i != j:
                    total = total + product.abs()
                elif form == "signed":
                    total = total + product
    return total


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", ["pairwise", "products", "signed"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_orthogonality_by_formula(name, form, scope):
    pool = pool_of(name, orthogonality_coefficient=0.3, orthogonality=form, orthogonality_scope=scope)
    rows = all_rows(pool)
    if scope == "global":
        rows = rows.transpose(0, 1).flatten(1)[None]
    found = pool(torch.randn(5, 8)).losses["orthogonality"]
    torch.testing.assert_close(found, 0.3 * orthogonality(rows, form))


@pytest.mark.parametrize("name", ["l2p", "by-key"])
def test_the_gram_form_is_of_prompts_and_keys(name):
    pool = pool_of(name, orthogonality_coefficient=0.3, orthogonality="gram")
    expected = orthogonality(all_rows(pool), "gram") + orthogonality(pool.rows("keys"), "gram")
    torch.testing.assert_close(pool(torch.randn(5, 8)).losses["orthogonality"], 0.3 * expected)


@pytest.mark.parametrize("name", ALL)
def test_diversity_is_the_sum_of_cosines_off_the_diagonal(name):
    """Section 9.5 of the specification; averaged over layers."""
    pool = pool_of(name, diversity_coefficient=0.3)
    expected = 0.0
    for layer in all_rows(pool):
        unit = F.normalize(layer, dim=-1)
        gram = unit @ unit.T
        expected = expected + (gram * (1 - torch.eye(len(layer)))).sum() / len(pool.prompts)
    torch.testing.assert_close(pool(torch.randn(5, 8)).losses["diversity"], 0.3 * expected)


@pytest.mark.parametrize("name", ["l2p", "deep", "by-key", "shared"])
def test_alignment_is_the_mean_squared_difference_of_keys_and_mean_prompts(name):
    """Section 7: F.mse_loss(K, mean of P over its length), layer by layer where there is more than one."""
    pool = pool_of(name, alignment_coefficient=0.3)
    means = pool.prompts.mean(-2) if name != "by-key" else pool.prompts.mean(dim=(1, 3))
    expected = F.mse_loss(pool.keys.expand_as(means), means)
    torch.testing.assert_close(pool(torch.randn(5, 8)).losses["alignment"], 0.3 * expected)


@pytest.mark.parametrize("name", ["l2p", "deep", "by-key", "shared"])
def test_selection_entropy_is_that_of_the_mean_softmax(name):
    pool, query = pool_of(name, entropy_coefficient=0.3), torch.randn(5, 8)
    if name == "shared":
        similarity, _ = pool.weigh(query)
    else:
        similarity = F.cosine_similarity(query[None, :, None], pool.keys[:, None], dim=-1)
    expected = 0.0
    for each in similarity:
        mean = each.softmax(-1).mean(0)
        expected = expected + (mean * mean.log()).sum() / len(similarity)
    torch.testing.assert_close(pool(query).losses["entropy"], 0.3 * expected)


TERMS = [
    {"orthogonality_coefficient": 0.3, "orthogonality": form, "orthogonality_scope": scope}
    for form, scope in [("gram", "layer"), ("pairwise", "layer"), ("products", "global"), ("signed", "layer")]
] + [{"diversity_coefficient": 0.3}, {"alignment_coefficient": 0.3}, {"entropy_coefficient": 0.3}]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(map(str, terms.values())))
def test_gradients_by_finite_differences(name, terms):
    if "entropy_coefficient" in terms and name == "experts":
        with pytest.raises(ValueError, match="entropy_coefficient is 0.3.*an image has no choice"):
            pool_of(name, **terms)
        return
    pool = pool_of(name, **terms).double()
    query = torch.randn(5, 8, dtype=torch.float64)
    parameters = [getattr(pool, each) for each in pool.row_axes]

    def value():
        pool.pair_sums.past.clear()
        losses = pool(query).losses
        return sum(term for each, term in losses.items() if each != "pull")

    found = torch.autograd.grad(value(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter.add_(sign * 1e-6 * direction)
                ends.append(value())
                parameter.sub_(sign * 1e-6 * direction)
        expected = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-7)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize("form", FORMS)
def test_pairs_with_past_rows_count_twice_and_those_between_them_once_for_all(form):
    current, past = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    whole, none = torch.cat([past, current], dim=1), torch.zeros(2, 0, 5)
    torch.testing.assert_close(
        FORMS[form](current, past) + FORMS[form](past, none), FORMS[form](whole, none), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["coda", "experts"])
def test_diversity_of_past_rows_is_the_same_counted_on_and_anew(name):
    pool = pool_of(name, tasks=1, diversity_coefficient=0.3)
    for task in range(1, 4):
        pool(torch.randn(2, 8))  # fills what is kept of past rows
        pool.config.tasks = [*pool.config.tasks, [task]]
        pool.begin_task(task)
        with torch.no_grad():
            pool.prompts.copy_(torch.randn_like(pool.prompts))
    query = torch.randn(2, 8)
    counted_on = pool(query).losses["diversity"]
    pool.pair_sums.past.clear()
    torch.testing.assert_close(counted_on, pool(query).losses["diversity"])


def test_adaptive_orthogonality_follows_the_likeness_of_tasks():
    """Section 9.10: 0.05 where tasks are alike (cosine of mean queries above 0.8), else 0.5."""
    torch.manual_seed(0)
    fields = {"components_per_task": 2, "prompt_length": 2, "layers": [0], "adaptive_orthogonality": True}
    model = get_peft_model(tiny(), CodaPromptConfig(**fields))
    pool, found = None, []
    shown = [images(16, seed=0), images(16, seed=0) + 0.001, -3 * images(16, seed=5).abs() - 2]
    means = []
    for task, pictures in enumerate(shown):
        model.begin_task([f"{task} a", f"{task} b"])
        model.base_model.look_at(pictures)
        pool = model.base_model.pool
        found.append(pool.task_coefficient.item())
        query = F.normalize(model.base_model.query(pictures), dim=-1).mean(0)
        means.append(F.normalize(query, dim=-1))
    likeness = torch.stack(means) @ torch.stack(means).T
    assert likeness[0, 1] > 0.8
    expected = [UNLIKE, ALIKE, ALIKE if likeness[2, :2].max() > 0.8 else UNLIKE]
    assert found == pytest.approx(expected)
    model.train()
    loss = model(pixel_values=shown[2], labels=labels(model, 16))
    pool.pair_sums.past.clear()
    raw = sum(pool._total(("orthogonality", name), FORMS["gram"]) for name in pool.row_axes) / pool.rows_in_use**2
    torch.testing.assert_close(model.base_model.head.last_losses["orthogonality"], (expected[-1] * raw).detach())
    assert torch.isfinite(loss.loss)


def test_terms_are_told_one_by_one():
    model = get_peft_model(
        tiny(),
        L2PConfig(**L2P[2], diversity_coefficient=0.1, alignment_coefficient=0.1, orthogonality_coefficient=0.1),
    )
    model.begin_task(["a", "b"])
    step(model)
    parts = model.base_model.head.last_losses
    assert set(parts) == {"cross_entropy", "pull", "diversity", "alignment", "orthogonality"}


@pytest.mark.parametrize("name", ["diversity_coefficient", "alignment_coefficient", "orthogonality_coefficient"])
def test_weights_below_zero_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} is -1, but must be a number of at least 0"):
        L2PConfig(**{name: -1})


def test_two_weights_of_orthogonality_are_refused():
    with pytest.raises(ValueError, match=r"orthogonality_coefficient is 0.1, but with adaptive_orthogonality.*to 0"):
        CodaPromptConfig(adaptive_orthogonality=True, orthogonality_coefficient=0.1)


def test_alignment_of_keys_with_another_width_is_refused():
    config = L2PConfig(alignment_coefficient=0.1, query_projection="linear", key_size=5)
    with pytest.raises(
        ValueError, match=r"alignment_coefficient is 0.1, but keys have 5 numbers and rows .* 24.*to 0"
    ):
        get_peft_model(tiny(), config)
