"""How prompts are chosen: similarity, width of keys, layer of the query, weights, thresholds, known tasks, FAISS."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tuner_cases import images, labels, logits, prompted, step, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig
from peft_cl.tuners.base.search import KeyIndex


L2P = {"pool_size": 6, "prompt_length": 4, "top_k": 2}
EXPERTS = {"pool_size": 4, "prompt_length": 4, "g_layers": [0], "layers": [1, 2]}
CODA = {"components_per_task": 2, "prompt_length": 4, "layers": [0, 2]}
METHODS = [(L2PConfig, L2P), (DualPromptConfig, EXPERTS), (CodaPromptConfig, {**CODA, "attention": False})]


def noisy(config_class, fields, tasks=3, **more):
    """A model with that many tasks begun, all that it trains noise, in evaluation mode."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(), config_class(**{**fields, **more}))
    for task in range(tasks):
        model.begin_task([f"class {task}", f"another {task}"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("config_class", "fields"), METHODS)
def test_dot_products_choose_by_length_too(config_class, fields):
    """By formula; and a key that is longer has a larger product, and the same cosine."""
    found = {}
    for similarity in ("cosine", "dot"):
        model = noisy(config_class, fields, similarity=similarity)
        pool, query = model.base_model.pool, model.base_model.query(images(16))
        keys = pool.rows("keys").detach()
        by_dot = query @ keys.mT
        expected = by_dot if similarity == "dot" else by_dot / query.norm(dim=-1)[:, None] / keys.norm(dim=-1)[:, None]
        if config_class is CodaPromptConfig:
            torch.testing.assert_close(pool.weigh(query)[0], expected)
        else:
            selected = pool(query).selected
            assert torch.equal(selected, expected.topk(selected.shape[-1]).indices[0])
        before = expected[..., -1]
        with torch.no_grad():
            pool.keys[..., -1, :] *= 100
        chosen = pool.weigh(query)[0] if config_class is CodaPromptConfig else pool(query).selected
        found[similarity] = chosen, before
    rows = keys.shape[-2]
    if config_class is CodaPromptConfig:
        torch.testing.assert_close(found["cosine"][0][..., -1], found["cosine"][1])
        torch.testing.assert_close(found["dot"][0][..., -1], 100 * found["dot"][1])
    else:  # where its product is positive, the longest key is chosen
        assert torch.equal((found["dot"][0] == rows - 1).any(-1), found["dot"][1][0] > 0)


@pytest.mark.parametrize(("config_class", "fields"), METHODS)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_keys_of_a_width_of_their_own(config_class, fields, kind):
    model = noisy(config_class, fields, query_projection=kind, key_size=5)
    pool = model.base_model.pool
    assert pool.rows("keys").shape[-1] == 5
    mapped = pool.query_projection(model.base_model.query(images()))
    assert mapped.shape == (4, 5)
    step(model)
    assert pool.keys.grad.abs().sum() > 0
    assert next(pool.query_projection.parameters()).grad.abs().sum() > 0


def test_a_linear_map_to_fewer_numbers_begins_orthogonal():
    model = get_peft_model(tiny(), L2PConfig(**L2P, query_projection="linear", key_size=5))
    weight = model.base_model.pool.query_projection.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("config_class", "fields"), METHODS)
@pytest.mark.parametrize(("layer", "number"), [(0, 0), (1, 1), (0.5, 1)])
def test_the_query_of_an_early_layer_is_its_cls_output(config_class, fields, layer, number):
    model = get_peft_model(tiny(), config_class(**fields, query_layer=layer)).eval()
    with torch.no_grad(), model.disable_adapter():
        states = model(images(), output_hidden_states=True).hidden_states
    norm = model.base_model.encoder.base_layer.layernorm
    torch.testing.assert_close(model.base_model.query(images()), norm(states[number + 1])[:, 0])


def test_the_query_pass_ends_at_its_layer():
    """Layers above it run once a batch, in the prompted pass alone."""
    runs = {}
    for layer in (None, 0):
        model = noisy(L2PConfig, L2P, query_layer=layer)
        last = model.base_model.encoder._layers[-1]
        count = []
        handle = last.register_forward_hook(lambda *_, count=count: count.append(1))
        logits(model)
        handle.remove()
        runs[layer] = len(count)
    assert runs == {None: 2, 0: 1}


def test_soft_weights_are_the_softmax_of_the_chosen_similarities():
    plain, soft = (noisy(L2PConfig, L2P, selection=name, selection_temperature=0.2) for name in ("topk", "soft"))
    query = plain.base_model.query(images())
    tokens = {name: model.base_model.pool(query).layers[0].tokens for name, model in (("topk", plain), ("soft", soft))}
    cosines = F.normalize(query, dim=-1) @ F.normalize(plain.base_model.pool.keys[0], dim=-1).T
    weights = 2 * (cosines.topk(2).values / 0.2).softmax(-1)
    expected = tokens["topk"].unflatten(1, (2, 4)) * weights[..., None, None]
    torch.testing.assert_close(tokens["soft"], expected.flatten(1, 2))


def test_soft_weights_teach_the_keys_by_the_cross_entropy():
    for selection, learns in (("topk", False), ("soft", True)):
        model = noisy(L2PConfig, L2P, selection=selection, pull_coefficient=0.0)
        step(model)
        assert bool(model.base_model.pool.keys.grad.abs().sum() > 0) is learns


def test_prompts_below_the_threshold_give_their_place_to_the_best():
    model = noisy(L2PConfig, {**L2P, "top_k": 4})
    pool, query = model.base_model.pool, model.base_model.query(images(16))
    cosines, rows = (F.normalize(query, dim=-1) @ F.normalize(pool.keys[0], dim=-1).T).topk(4)
    threshold = cosines.median().item()
    pool.config.selection, pool.config.selection_threshold = "threshold", threshold
    expected = torch.where(cosines >= threshold, rows, rows[:, :1])
    assert torch.equal(pool(query).selected, expected)
    assert 0 < (expected != rows).sum() < expected.numel()


@pytest.mark.parametrize("name", ["dualprompt", "l2p"])
def test_a_known_task_takes_its_own_rows(name):
    fields = {"known_task_rows": True, **({"use_prompt_mask": True} if name == "l2p" else {})}
    model = prompted(name, tasks=3, **fields)
    numbers = torch.tensor([2, 0, 1, 1])
    logits(model, task_ids=numbers)
    expected = numbers[:, None] if name == "dualprompt" else numbers[:, None] * 2 + torch.arange(2)
    assert torch.equal(model.base_model.head.last_selected, expected)
    with pytest.raises(ValueError, match=r"task_ids holds \[3\], but the active adapter has begun 3 tasks"):
        logits(model, task_ids=torch.tensor([0, 3, 1, 1]))
    logits(model)  # unknown again: by the keys
    assert model.base_model.pool.known_tasks is None


def test_the_expert_is_chosen_by_its_key_in_training_too():
    """Section 3 of the specification: i* = argmax q' K_i, over experts that all tasks share."""
    model = noisy(DualPromptConfig, EXPERTS, expert_choice="key", similarity="dot").train()
    pool = model.base_model.pool
    assert pool.rows_in_use == 4
    query = model.base_model.query(images(16))
    output = model(pixel_values=images(16), labels=labels(model, 16))
    assert torch.equal(model.base_model.head.last_selected, (query @ pool.keys[0].T).argmax(-1, keepdim=True))
    output.loss.backward()
    moved = pool.prompts.grad.abs().sum(dim=(0, 1, 3, 4)) > 0
    assert set(moved.nonzero()[:, 0].tolist()) == set(model.base_model.head.last_selected.unique().tolist())


# ----------------------------------------------------------------------------------------------- order of tokens


@pytest.mark.parametrize("name", ["l2p", "l2p-textbook", "dualprompt-textbook", "coda-textbook", "coda-layer-mean"])
def test_the_order_of_tokens_changes_nothing_but_their_places(name):
    more = {"prompt_type": "tokens"} if name == "coda-layer-mean" else {}
    first, behind = (prompted(name, token_order=order, **more) for order in ("prompts_first", "cls_first"))
    behind.load_state_dict(first.state_dict())
    torch.testing.assert_close(logits(first), logits(behind), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        states = [model(images(), output_hidden_states=True).hidden_states[1] for model in (first, behind)]
    count = states[0].shape[1] - 5  # a CLS token and four patches
    torch.testing.assert_close(
        states[0], torch.cat([states[1][:, 1 : 1 + count], states[1][:, :1], states[1][:, 1 + count :]], 1)
    )


# ----------------------------------------------------------------------------------------------- FAISS


def test_faiss_finds_the_keys_that_are_compared_one_by_one():
    exact, by_graph = (noisy(L2PConfig, {**L2P, "pool_size": 300}, search=name) for name in ("exact", "faiss"))
    query = exact.base_model.query(images(32))
    assert torch.equal(exact.base_model.pool(query).selected, by_graph.base_model.pool(query).selected)
    torch.testing.assert_close(logits(exact), logits(by_graph))
    step(by_graph)  # keys move: what was found is out of date
    moved = exact.base_model.pool.keys.detach().flip(1)
    with torch.no_grad():
        for model in (exact, by_graph):
            model.base_model.pool.keys.copy_(moved)
    assert torch.equal(exact.base_model.pool(query).selected, by_graph.eval().base_model.pool(query).selected)
    assert torch.equal(
        copy.deepcopy(by_graph).base_model.pool(query).selected, by_graph.base_model.pool(query).selected
    )


@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_the_graph_of_a_large_pool_finds_nearly_all(kind):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 5000, 32, generator=generator) * torch.rand(2, 5000, 1, generator=generator)
    query = torch.randn(50, 32, generator=generator)
    found = KeyIndex().nearest(query, keys, 5, kind, stamp=0)
    scores = query @ keys.mT if kind == "dot" else F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).mT
    exact = scores.topk(5).indices
    recall = (found[..., None] == exact[..., None, :]).any(-1).float().mean()
    assert found.shape == (2, 50, 5) and recall > 0.95


BAD = [
    (
        L2PConfig,
        {"selection_threshold": 1.5, "selection": "threshold"},
        "selection_threshold is 1.5.*at least -1 and at",
    ),
    (L2PConfig, {"selection_temperature": 0}, "selection_temperature is 0.*above 0"),
    (L2PConfig, {"selection": "threshold", "batchwise_prompt": True}, "selection is 'threshold', but with batchwise"),
    (
        L2PConfig,
        {"known_task_rows": True},
        "known_task_rows is True, but without use_prompt_mask.*Set use_prompt_mask",
    ),
    (
        L2PConfig,
        {"shared_prompt_pool": True, "past_rows": "frozen"},
        "shared_prompt_pool is True.*past_rows to 'trained'",
    ),
    (L2PConfig, {"key_size": 8}, "key_size is 8, but query_projection is None.*Set query_projection='linear'"),
    (L2PConfig, {"key_size": 0, "query_projection": "mlp"}, "key_size is 0.*at least 1"),
    (L2PConfig, {"query_layer": -1}, "query_layer is -1, but must be a whole number, counted from 0; or a fraction"),
    (L2PConfig, {"query_layer": 1.0}, "query_layer is 1.0"),
    (
        L2PConfig,
        {"query_layer": 2, "head": "fusion"},
        "query_layer is 2, but head='fusion'.*Leave query_layer at None",
    ),
    (CodaPromptConfig, {"query_layer": 2, "query_source": "layer_cls"}, "query_layer is 2.*no query pass"),
    (CodaPromptConfig, {"token_order": "cls_first"}, "token_order is 'cls_first', but prompt_type is 'prefix'"),
    (DualPromptConfig, {"known_task_rows": True, "expert_choice": "key"}, "known_task_rows is True.*no row belongs"),
    (
        DualPromptConfig,
        {"entropy_coefficient": 0.1},
        "entropy_coefficient is 0.1.*Set it to 0, or expert_choice='key'",
    ),
]


@pytest.mark.parametrize(("config_class", "fields", "message"), BAD)
def test_bad_settings_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_a_query_layer_that_the_backbone_lacks_is_refused():
    with pytest.raises(ValueError, match="query_layer is 3, but the base model has 3 layers, counted 0 to 2"):
        get_peft_model(tiny(), L2PConfig(**L2P, query_layer=3))


def test_faiss_that_is_not_installed_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr("peft_cl.tuners.base.search.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"search is 'faiss', but FAISS is not installed.*peft-cl\[faiss\].*'exact'"):
        L2PConfig(search="faiss")
