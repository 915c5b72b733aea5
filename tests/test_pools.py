"""The arithmetic of the pools, against sums done by hand and against the papers' sentences written down plainly."""

from __future__ import annotations

import math

import pytest
import torch
from tuner_cases import begin, images, labels, prompted, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig
from peft_cl.tuners.base.initialisation import RowSpan, draw_rows
from peft_cl.tuners.base.pool import Geometry
from peft_cl.tuners.base.prompts import Injection
from peft_cl.tuners.base.similarity import (
    batch_vote,
    cosine,
    pull_term,
    selection_entropy_term,
)
from peft_cl.tuners.coda.pool import CodaPromptPool
from peft_cl.tuners.dualprompt.pool import DualPromptPool
from peft_cl.tuners.l2p.pool import L2PPool


SMALL = Geometry(hidden_size=2, num_layers=3)
QUERY = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # lengths 5 and 2
KEYS = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [-3.0, -4.0]]])  # one set of three


# ----------------------------------------------------------------------------------------------- terms


def test_cosine():
    torch.testing.assert_close(cosine(QUERY, KEYS), torch.tensor([[[0.6, 0.8, -1.0], [0.0, 1.0, -0.8]]]))


@pytest.mark.parametrize(
    ("form", "per_sample"),
    [
        ("cosine", [-1.4, -0.2]),  # -(0.6 + 0.8), -(1.0 - 0.8)
        ("cosine_distance", [0.6, 1.8]),
        ("squared_distance", [(1 + 16 + 9 + 9) / 2, (1 + 9 + 36) / 2]),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pull_term(form, per_sample, reduction):
    selected = torch.tensor([[[0, 1], [1, 2]]])
    expected = sum(per_sample) / (2 if reduction == "mean" else 1)
    for sets in (1, 2):
        keys = KEYS.expand(sets, -1, -1)
        term = pull_term(
            QUERY, keys, cosine(QUERY, keys), selected.expand(sets, -1, -1), form=form, reduction=reduction
        )
        assert term.item() == pytest.approx(sets * expected)  # summed over key sets


def test_selection_entropy_term():
    even, sharp = torch.zeros(1, 2, 4), torch.tensor([[[100.0, 0.0], [100.0, 0.0]]])
    assert selection_entropy_term(even).item() == pytest.approx(-math.log(4))
    assert selection_entropy_term(sharp).item() == pytest.approx(0.0, abs=1e-6)
    each_its_own = torch.tensor([[[100.0, 0.0], [0.0, 100.0]]])  # the batch's mean is even
    assert selection_entropy_term(each_its_own).item() == pytest.approx(-math.log(2))
    both = torch.cat([sharp, each_its_own])
    assert selection_entropy_term(both).item() == pytest.approx(-math.log(2) / 2)


def test_batch_vote():
    selected = torch.tensor([[[4, 1], [1, 3], [3, 4], [3, 0]], [[0, 1], [0, 1], [2, 3], [3, 2]]])
    expected = torch.tensor([[3, 1], [0, 1]])  # of 1 and 4 with two votes each, the lower row; of four equals 0 and 1
    assert torch.equal(batch_vote(selected, 5), expected[:, None].expand(2, 4, 2))


def test_separation_term():
    pool = DualPromptPool(DualPromptConfig(separation_coefficient=0.5, layers=[0]), SMALL)
    general, expert = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [4.0, 0.0]])
    # centred: [-1, 0], [1, 0] and [-2, 1], [2, -1]; covariance [[4, -2], [0, 0]]
    (term,) = pool.compare({"general": general, "expert": expert}).values()
    assert term.item() == pytest.approx(0.5 * (16 + 4))
    (term,) = pool.compare({"general": general + 7.0, "expert": expert - 3.0}).values()
    assert term.item() == pytest.approx(10.0)


def test_the_separation_term_compares_the_two_prompts_alone():
    model = prompted("dualprompt", separation_coefficient=1.0)
    model.train()(images(), labels=labels(model))
    found = model.base_model.head.last_losses["separation"]
    pool, features = model.base_model.pool, []
    for silent in ("prompts", "g_prompts"):
        part = pool(model.query(images())).parts["general" if silent == "prompts" else "expert"]
        tokens, _ = model.base_model.encoder.encode(images(), part)
        features.append(tokens[:, 0] - tokens[:, 0].mean(0))
        assert set(part.layers) == ({0} if silent == "prompts" else {1, 2})
    covariance = features[0].T @ features[1] / 3
    torch.testing.assert_close(found, covariance.square().sum().detach())


# ----------------------------------------------------------------------------------------------- initial rows


@pytest.mark.parametrize(
    ("init", "low", "high"), [("uniform", 0, 0.01), ("wide_uniform", -1, 1), ("unit_uniform", 0, 1)]
)
def test_uniform_rows(init, low, high):
    rows = draw_rows(init, 40, 500)
    assert low <= rows.min() and rows.max() < high
    assert rows.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_normal_rows():
    assert draw_rows("normal", 40, 500).std().item() == pytest.approx(0.02, rel=0.05)


def gram_schmidt(drawn: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """The paper's sentence, one row after the other: subtract what the earlier rows explain, then unit norm."""
    rows = torch.cat([past, drawn])
    for place, row in enumerate(rows):
        earlier = rows[:place]
        for _ in range(2):
            row = row - (earlier @ row) @ earlier
        rows[place] = row / row.norm()
    return rows[len(past) :]


def span_of(past: torch.Tensor, count: int) -> RowSpan:
    span = RowSpan(past.shape[1], count)
    span.follow(len(past), lambda first, last: past[first:last])
    return span


@pytest.mark.parametrize(("past_rows", "size"), [(0, 12), (1, 12), (5, 12), (1000, 1500)])
def test_new_rows_are_those_of_gram_schmidt(past_rows, size):
    past = torch.randn(past_rows, size, dtype=torch.float64) * torch.linspace(1, 5, past_rows)[:, None]
    torch.manual_seed(3)
    rows = span_of(past.float(), 4).new_rows()
    torch.manual_seed(3)
    expected = gram_schmidt(torch.randn(4, size, dtype=torch.float64), past)
    torch.testing.assert_close(rows.double(), expected, atol=1e-5, rtol=0)


def test_a_span_does_not_depend_on_when_it_was_made():
    """An interrupted run makes it anew, and must go on to the bit."""
    past = torch.randn(40, 24)
    at_once, step_by_step = span_of(past, 2), RowSpan(24, 2)
    for end in range(2, 41, 2):
        step_by_step.follow(end, lambda first, last: past[first:last])
    assert torch.equal(at_once.basis, step_by_step.basis)


def test_rows_within_the_span_take_no_room():
    span = span_of(torch.eye(6)[[0, 1, 0, 1, 1, 0]], 2)
    assert len(span.basis) == 2 and span.rows_seen == 6


@pytest.mark.parametrize("past", [[[1, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 0, 0], [0, 1, 0]]], ids=str)
def test_rows_after_one_that_adds_nothing_are_avoided(past):
    past = torch.nn.functional.pad(torch.tensor(past, dtype=torch.float32), (0, 5))
    span = span_of(past, 3)
    assert len(span.basis) == 2
    torch.testing.assert_close(span.new_rows() @ past.T, torch.zeros(3, 3), atol=1e-6, rtol=0)


def test_new_rows_beyond_the_dimensions_avoid_the_latest():
    past = torch.eye(6)
    rows = span_of(past, 2).new_rows()
    torch.testing.assert_close(rows @ rows.T, torch.eye(2))
    torch.testing.assert_close(rows @ past[2:].T, torch.zeros(2, 4), atol=1e-6, rtol=0)
    for count in (4, 6):
        rows = span_of(torch.randn(3 * count, 6), count).new_rows()
        torch.testing.assert_close(rows @ rows.T, torch.eye(count))
    with pytest.raises(
        ValueError, match="7 new rows of 6 numbers cannot be orthogonal.*Begin with fewer rows .*components_per_task"
    ):
        RowSpan(6, 7)


@pytest.mark.parametrize("name", ["coda", "coda-textbook"])
def test_coda_begins_each_task_with_orthonormal_rows(name):
    """P flattened, K and A; each layer for itself; against earlier rows as training has left them."""
    model = prompted(name)
    model.begin_task(["one", "more"])
    pool = model.base_model.pool
    for part in pool.row_axes:
        assert getattr(pool, f"past_{part}").shape[1] == 4 and getattr(pool, part).shape[1] == 2
        rows = pool.rows(part).flatten(2)  # (layers, 6, numbers)
        gram = rows @ rows.transpose(1, 2)
        new = torch.cat([torch.zeros(2, 4), torch.eye(2)], dim=1)
        torch.testing.assert_close(gram[:, 4:], new.expand(len(rows), -1, -1), atol=1e-4, rtol=0)
        assert (gram[:, :4, :4] - torch.eye(4)).abs().max() > 0.1  # the earlier rows are trained ones


# ----------------------------------------------------------------------------------------------- choosing


def l2p_pool(**fields) -> L2PPool:
    pool = L2PPool(L2PConfig(pool_size=3, prompt_length=2, top_k=2, **fields), SMALL).eval()
    with torch.no_grad():
        pool.keys.copy_(KEYS)
        pool.prompts.copy_(torch.arange(12.0).view(1, 3, 2, 2))
    return pool


def test_l2p_chains_the_nearest_prompts():
    prompts = l2p_pool()(QUERY)
    assert prompts.selected.tolist() == [[1, 0], [1, 0]] and prompts.losses == {}
    assert prompts.layers[0].tokens[0].flatten().tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert prompts.layers[0].keys is None and prompts.layers[0].keep


def test_l2p_as_prefix_halves_each_prompt():
    entering = l2p_pool(prompt_type="prefix", head_type="cls")(QUERY).layers[0]
    assert entering.keys[0].tolist() == [[4, 5], [0, 1]] and entering.values[0].tolist() == [[6, 7], [2, 3]]
    assert entering.tokens is None


def test_l2p_votes_in_training_and_only_if_asked_at_test():
    query = torch.tensor([[-1.0, 0.1], [-0.1, -1.0], [0.9, 1.0]])
    keys_by_sample = [[1, 2], [0, 2], [0, 1]]  # each sample's two nearest, of which row 0 and 1 and 2 have two votes
    for at_test in (False, True):
        pool = l2p_pool(batchwise_prompt=True, batchwise_prompt_at_test=at_test)
        voted = [[0, 1]] * 3
        assert pool.train()(query).selected.sort(-1).values.tolist() == voted
        assert pool.eval()(query).selected.sort(-1).values.tolist() == (voted if at_test else keys_by_sample)


def test_dualprompt_puts_the_general_prompt_first():
    fields = {"prompt_length": 1, "g_prompt_length": 1, "layers": [0, 2], "g_layers": [0]}
    pool = DualPromptPool(DualPromptConfig(**fields), SMALL)
    with torch.no_grad():
        pool.g_prompts.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(-1, -1, -1, 2))
        pool.prompts.copy_(torch.tensor([3.0, 4.0, 5.0, 6.0]).view(2, 2, 1, 1, 1).expand(-1, -1, -1, -1, 2))
    for mode in (True, False):
        layers = pool.train(mode)(QUERY).layers
        assert layers[0].keys[0, :, 0].tolist() == [1, 3] and layers[0].values[0, :, 0].tolist() == [2, 4]
        assert layers[2].keys[0, :, 0].tolist() == [5] and layers[2].values[0, :, 0].tolist() == [6]
    pool = DualPromptPool(
        DualPromptConfig.from_preset("textbook", prompt_length=1, g_prompt_length=2, expert_choice="task"), SMALL
    )
    entering = pool(QUERY).layers[0]
    assert torch.equal(entering.tokens[0], torch.cat([pool.g_prompts[0, 0], pool.prompts[0, 0, 0]]))


def test_coda_weights_all_components():
    """w = cosine(q * A, K); p = sum of w P; no softmax."""
    pool = CodaPromptPool(CodaPromptConfig(components_per_task=2, prompt_length=2, layers=[1]), SMALL)
    with torch.no_grad():
        pool.attention.copy_(torch.tensor([[[1.0, 0.0], [2.0, 1.0]]]))
        pool.keys.copy_(torch.tensor([[[5.0, 0.0], [3.0, 2.0]]]))
        pool.prompts.copy_(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[10.0, 0.0], [0.0, 20.0]]]]))
    # q * A = [3, 0] and [6, 4]: cosines with K are 1 and (18 + 8) / (sqrt(52) sqrt(13)) = 1; for the second sample
    # q * A = [0, 0] and [0, 2]: 0 and 4 / (2 sqrt(13))
    entering = pool(QUERY).layers[1]
    weights = torch.tensor([[1.0, 1.0], [0.0, 2 / math.sqrt(13)]])
    torch.testing.assert_close(entering.keys[:, 0, 0], weights @ torch.tensor([1.0, 10.0]))
    torch.testing.assert_close(entering.values[:, 0, 1], weights @ torch.tensor([1.0, 20.0]))


@pytest.mark.parametrize("source", ["layer_cls", "layer_mean"])
def test_coda_by_the_layers_own_input(source):
    """One pass: the query of a layer is what enters it, and its prompt tokens leave again after it."""
    model = prompted("coda-textbook", query_source=source)
    output = model(images(), output_hidden_states=True)
    pool = model.base_model.pool
    assert [states.shape[1] for states in output.hidden_states] == [8, 8, 8, 5]  # 3 prompt rows, CLS, 4 patches
    for layer, states in enumerate(output.hidden_states[:3]):
        own = states[:, 3] if source == "layer_cls" else states[:, 3:].mean(1)
        chosen = cosine(own, pool.rows("keys")[layer]).argmax(-1)
        assert torch.equal(states[:, :3], pool.rows("prompts")[layer, chosen])
    calls = []
    model.base_model.encoder.base_layer.layernorm.register_forward_hook(lambda *_: calls.append(1))
    model(images())
    assert len(calls) == 1


def test_prompt_tokens_may_take_the_position_of_cls():
    plain, placed = prompted("l2p"), prompted("l2p", prompt_positions="cls")
    position = tiny().vit.embeddings.position_embeddings[0, 0]
    first, second = (model(images(), output_hidden_states=True).hidden_states[0] for model in (plain, placed))
    torch.testing.assert_close(second[:, :6], first[:, :6] + position)
    assert torch.equal(second[:, 6:], first[:, 6:])


@pytest.mark.parametrize(
    ("head_type", "rows"), [("prompt", range(6)), ("cls", [6]), ("cls+prompt", range(7)), ("mean", range(11))]
)
@pytest.mark.parametrize("family", ["vit", "deit"])
def test_what_the_head_reads(family, head_type, rows):
    model = prompted("l2p", family, head_type=head_type)
    tuner = model.base_model
    rows = range(12) if head_type == "mean" and family == "deit" else rows  # the distillation token is one more
    states = model(images(), output_hidden_states=True).hidden_states[-1]
    feature = tuner.encoder.base_layer.layernorm(states)[:, list(rows)].mean(1)
    torch.testing.assert_close(model(images()).logits, tuner.head.active(feature))


def test_a_query_projection_starts_at_the_papers_query():
    plain, linear = (L2PPool(L2PConfig(query_projection=kind), SMALL) for kind in (None, "linear"))
    assert torch.equal(linear.query_projection(QUERY), plain.query_projection(QUERY))
    assert len(L2PPool(L2PConfig(query_projection="mlp"), SMALL).query_projection) == 3


def test_halves():
    prompts = torch.arange(8.0).view(1, 2, 4, 1)
    entering = Injection.from_halves(prompts)
    assert entering.keys.flatten().tolist() == [0, 1, 4, 5] and entering.values.flatten().tolist() == [2, 3, 6, 7]
    entering = Injection.from_halves(prompts[:, 0])
    assert entering.keys.flatten().tolist() == [0, 1] and entering.values.flatten().tolist() == [2, 3]


def test_a_pool_grows_without_end():
    model = prompted("dualprompt", pool_size=None, tasks=12)
    assert model.base_model.pool.rows("prompts").shape[2] == model.peft_config["default"].rows_in_use == 12
    model = prompted("coda", tasks=30)  # 60 rows of width 24: more than can be orthogonal
    begin(model, 30)
    assert torch.isfinite(model(images()).logits).all() and model.base_model.pool.rows_in_use == 62
