"""How rows of a pool begin and grow: every initialisation, growth by hand, in every task and where a pool is full."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import MAKERS
from peft import PeftModel, get_peft_model
from tuner_cases import images, step, task_names, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, suggested_pool_size


L2P = {"pool_size": 6, "prompt_length": 4, "top_k": 2}
PREFIX = {**L2P, "prompt_type": "prefix", "head_type": "cls", "layers": [0, 1, 2], "keys_per_layer": True}
EXPERTS = {"pool_size": 4, "prompt_length": 4, "g_layers": [0], "layers": [1, 2]}
SHARED_EXPERTS = {**EXPERTS, "expert_choice": "key"}
CODA = {"components_per_task": 2, "prompt_length": 4, "layers": [0, 2]}
SHARED_CODA = {**CODA, "components_per_task": None, "pool_size": 4}
SHARED = [(L2PConfig, L2P), (L2PConfig, PREFIX), (DualPromptConfig, SHARED_EXPERTS), (CodaPromptConfig, SHARED_CODA)]
ALL = [*SHARED, (DualPromptConfig, EXPERTS), (CodaPromptConfig, CODA)]


def learnt(config_class, fields, tasks=1, steps=0, **more):
    """A model with that many tasks begun, each shown images, and learnt for some steps."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(), config_class(**{**fields, **more}))
    for task in range(tasks):
        model.begin_task(task_names(task))
        model.base_model.look_at(images(8, seed=task))
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
        for _ in range(steps):
            step(model)
            optimizer.step()
    return model


def rows_of(pool, name):
    """(sets, rows, numbers)."""
    return pool.flat(name, pool.rows(name).detach())


def farthest(rows, others):
    """How far a row is, at most, from the nearest of the others."""
    return (rows[:, None] - others[None]).norm(dim=-1).min(dim=1).values.max()


# ----------------------------------------------------------------------------------------------- beginning


@pytest.mark.parametrize(("config_class", "fields"), ALL)
@pytest.mark.parametrize(("init", "std"), [("normal", 0.02), ("near_zero", 1e-4)])
def test_small_normal_rows_in_every_method(config_class, fields, init, std):
    pool = learnt(config_class, fields, init=init).base_model.pool
    assert pool.prompts.std().item() == pytest.approx(std, rel=0.15)
    assert pool.keys.std().item() == pytest.approx(std, rel=0.35)  # few numbers


@pytest.mark.parametrize(("config_class", "fields"), ALL)
def test_orthogonal_rows_in_every_method_and_after_growth(config_class, fields):
    """Gram-Schmidt: new rows are orthonormal, and orthogonal to those that were trained before."""
    model = learnt(config_class, fields, steps=2, init="orthogonal")
    pool = model.base_model.pool
    before = pool.rows_in_use
    if model.peft_config["default"].shares_rows:
        assert model.base_model.grow_pool(2) == 2
    else:
        model.begin_task(["neu"])
    if config_class is DualPromptConfig and not model.peft_config["default"].shares_rows:
        names = ["keys"]  # the prompt is a copy of the task's before
    else:
        names = list(pool.row_axes)
    for name in names:
        rows = rows_of(pool, name)
        new = rows[:, before:]
        assert new.shape[1] == pool.rows_in_use - before > 0
        torch.testing.assert_close(new @ new.mT, torch.eye(new.shape[1]).expand(len(rows), -1, -1), atol=1e-5, rtol=0)
        assert (new @ rows[:, :before].mT).abs().max() < 1e-5


def test_more_orthogonal_rows_than_numbers_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"25 new rows of 24 numbers cannot be orthogonal.*fewer rows .*pool_size"):
        learnt(L2PConfig, {**L2P, "pool_size": 25}, init="orthogonal")


@pytest.mark.parametrize(("config_class", "fields"), [(L2PConfig, PREFIX), (DualPromptConfig, EXPERTS)])
def test_hierarchical_layers_are_the_one_before_plus_noise(config_class, fields):
    pool = learnt(config_class, fields, init_layers="hierarchical", init_noise=0.05, prompt_length=40).base_model.pool
    rows = rows_of(pool, "prompts")
    steps = rows[1:] - rows[:-1]
    assert steps.std().item() == pytest.approx(0.05, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([steps.flatten(), rows[:-1].flatten()]))[0, 1].item()) < 0.1


@pytest.mark.parametrize(("config_class", "fields"), ALL)
def test_prompts_begin_as_patches_and_keys_as_queries_of_the_tasks_images(config_class, fields):
    model = learnt(config_class, fields, init="patches", key_init="queries")
    pool, shown = model.base_model.pool, images(8, seed=0)
    queries, patches = model.base_model.looks_of(shown)
    base = tiny()
    torch.testing.assert_close(patches, base.vit.embeddings(shown)[:, 1:].flatten(0, 1))  # without the CLS token
    rows = pool.prompts.detach().reshape(-1, 24)
    assert farthest(rows, patches) == 0
    assert farthest(pool.keys.detach().reshape(-1, 24), queries) == 0
    assert len(rows.unique(dim=0)) >= min(len(rows), len(patches)) / 2  # not one row for all


def test_patches_of_another_width_than_the_prompts_are_refused():
    """Swin's layers grow wider; its patches are as wide as the first."""
    config = L2PConfig(**{**PREFIX, "layers": [0, 2]}, init="patches")
    with pytest.raises(ValueError, match=r"init is 'patches', but embeddings of patches have \d+ numbers.*\[0, 2\]"):
        get_peft_model(MAKERS["swin"](), config)


def test_new_rows_begin_from_the_images_of_their_own_task():
    model = learnt(L2PConfig, L2P, tasks=2, steps=1, init="patches", growth="every_task", growth_size=3)
    pool = model.base_model.pool
    _, patches = model.base_model.looks_of(images(8, seed=1))
    fresh = learnt(L2PConfig, L2P, tasks=2, init="patches", growth="every_task", growth_size=3).base_model.pool
    assert farthest(fresh.prompts.detach()[:, 6:].reshape(-1, 24), patches) == 0
    assert pool.rows_in_use == 9


@pytest.mark.parametrize(("config_class", "fields"), SHARED)
def test_rows_of_another_adapter(config_class, fields, tmp_path):
    other = learnt(config_class, fields, steps=2)
    other.save_pretrained(tmp_path)
    model = learnt(config_class, fields, init="adapter", init_from=str(tmp_path))
    for name in model.base_model.pool.row_axes:
        assert torch.equal(getattr(model.base_model.pool, name), getattr(other.base_model.pool, name))
    model.save_pretrained(tmp_path / "own")
    (tmp_path / "adapter_model.safetensors").unlink()  # a saved adapter needs the other no more
    PeftModel.from_pretrained(tiny(), tmp_path / "own")


def test_a_loaded_adapter_does_not_look_for_the_one_that_it_began_from(tmp_path):
    """Whoever wrote its configuration could name any place; its rows are its own, before its first task too."""
    learnt(L2PConfig, L2P).save_pretrained(tmp_path / "first")
    config = L2PConfig(**L2P, init="adapter", init_from=str(tmp_path / "first"))
    get_peft_model(tiny(), config).save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    model = PeftModel.from_pretrained(tiny(), tmp_path / "second", is_trainable=True)
    rows = model.base_model.pool.prompts.detach().clone()
    model.begin_task(["a", "b"])
    assert torch.equal(model.base_model.pool.prompts, rows)


def test_an_adapter_that_is_not_there_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"init_from is '.*nowhere', but no prompt adapter is there.*save_pretrained"):
        learnt(L2PConfig, L2P, init="adapter", init_from=str(tmp_path / "nowhere"))
    learnt(L2PConfig, {**L2P, "pool_size": 4}).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"whose prompts are of the shape \(1, 4, 4, 24\).*\(1, 6, 4, 24\).*no more rows"
    ):
        learnt(L2PConfig, L2P, init="adapter", init_from=str(tmp_path))
    few = learnt(L2PConfig, {**L2P, "pool_size": 3}, init="adapter", init_from=str(tmp_path)).base_model.pool
    assert few.prompts.shape[1] == 3


# ----------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("tasks", "classes", "size"), [(1, 2, 10), (5, 10, 10), (10, 100, 20), (10, 200, 40), (20, 100, 40), (3, 99, 19)]
)
def test_the_rule_for_the_size_of_a_pool(tasks, classes, size):
    """max(2 T, T C / 5, 10)."""
    assert suggested_pool_size(tasks, classes) == size == max(2 * tasks, classes // 5, 10)


@pytest.mark.parametrize(("config_class", "fields"), SHARED)
def test_the_size_is_settled_once_the_scenario_is_known(config_class, fields):
    config = config_class(**{**fields, "pool_size": "auto"})
    with pytest.raises(
        ValueError, match=r"pool_size is 'auto', but here the scenario is not known.*suggested_pool_size"
    ):
        get_peft_model(tiny(), config)
    config.set_pool_size(10, 100)
    assert get_peft_model(tiny(), config).base_model.pool.rows_in_use == config.pool_size == 20


@pytest.mark.parametrize(("config_class", "fields"), [(DualPromptConfig, EXPERTS), (CodaPromptConfig, CODA)])
def test_a_size_by_the_rule_is_refused_where_tasks_bring_their_rows(config_class, fields):
    with pytest.raises(ValueError, match="pool_size is 'auto', but each task .*Set pool_size to None, or "):
        config_class(**{**fields, "pool_size": "auto"})


@pytest.mark.parametrize("size", [0, -1, 2.5, "large", True])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="pool_size is .*whole number of at least 1"):
        L2PConfig(pool_size=size)


# ----------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize(("config_class", "fields"), SHARED)
@pytest.mark.parametrize("past_rows", ["trained", "frozen"])
def test_a_pool_that_grows_keeps_its_rows_and_trains_what_it_should(config_class, fields, past_rows, tmp_path):
    model = learnt(config_class, fields, steps=1, past_rows=past_rows)
    pool, size = model.base_model.pool, fields["pool_size"]
    before = {name: pool.rows(name).detach().clone() for name in pool.row_axes}
    assert model.base_model.grow_pool(3) == 3
    config = model.peft_config["default"]
    assert (pool.rows_in_use, config.rows_in_use, config.total_rows, config.grown) == (size + 3,) * 3 + ([3],)
    for name, rows in before.items():
        assert torch.equal(pool.rows(name).detach().narrow(pool.row_axes[name], 0, size), rows)
    trained = pool.keys.shape[-2]
    assert trained == (3 if past_rows == "frozen" else size + 3)
    step(model)
    assert pool.keys.grad.shape[-2] == trained
    model.begin_task(["neu"])  # the rows of a growth go on learning until the next one
    assert pool.keys.shape[-2] == trained
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(images()).logits, again(images()).logits)


def test_growth_in_every_task_ends_at_the_limit():
    model = learnt(L2PConfig, L2P, tasks=4, growth="every_task", growth_size=4, max_pool_size=12)
    config = model.peft_config["default"]
    assert config.grown == [4, 2] and model.base_model.pool.rows_in_use == 12
    with pytest.raises(ValueError, match="the pool has 12 rows, and max_pool_size is 12. Raise it"):
        model.base_model.grow_pool(1)


@pytest.mark.parametrize(("similarity", "entropy", "grows"), [(-1.0, 1.0, False), (1.0, 1.0, True), (-1.0, 0.0, True)])
def test_adaptive_growth_follows_similarity_and_evenness(similarity, entropy, grows):
    model = learnt(L2PConfig, L2P, tasks=2, growth="adaptive", growth_similarity=similarity, growth_entropy=entropy)
    assert model.peft_config["default"].grown == ([5] if grows else None)


def test_a_pool_is_full_by_the_formula():
    model = learnt(L2PConfig, L2P, growth="adaptive")
    pool = model.base_model.pool
    query = model.base_model.query(images(16))
    cosines = F.normalize(query, dim=-1) @ F.normalize(pool.keys[0], dim=-1).T
    best = cosines.max(dim=1).values.mean().item()
    shares = torch.bincount(cosines.topk(2).indices.flatten(), minlength=6) / 32
    evenness = -(shares * shares.clamp_min(1e-12).log()).sum().item() / torch.tensor(6.0).log().item()
    config = pool.config
    for low, high, expected in [
        (best - 0.01, evenness + 0.01, False),
        (best + 0.01, evenness + 0.01, True),
        (best - 0.01, evenness - 0.01, True),
    ]:
        config.growth_similarity, config.growth_entropy = low, high
        assert pool.is_full(query) is expected


def test_the_diversified_selection_counts_new_rows_too():
    model = learnt(L2PConfig, L2P, tasks=3, steps=1, growth="every_task", growth_size=2, frequency_penalty=True)
    assert model.base_model.pool.chosen_before.shape == (1, 10)


@pytest.mark.parametrize(("config_class", "fields"), [(DualPromptConfig, EXPERTS), (CodaPromptConfig, CODA)])
def test_where_tasks_bring_their_rows_growth_is_refused(config_class, fields):
    with pytest.raises(
        ValueError, match=r"growth is 'adaptive', but each task has rows of its own.*let the tasks share"
    ):
        config_class(**fields, growth="adaptive")
    model = learnt(config_class, fields)
    with pytest.raises(
        ValueError, match="no rows are shared by the tasks: each brings its own. Leave the call out, or"
    ):
        model.base_model.grow_pool(1)


def test_frozen_prompts_do_not_grow():
    model = learnt(L2PConfig, L2P, train_prompts="first_task", head="ridge", head_features="cls")
    model.begin_task(["neu"])
    with pytest.raises(ValueError, match=r"frozen after the first task.*train_prompts='every_task'"):
        model.base_model.grow_pool(1)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_growth_by_what_is_no_number_is_refused(count):
    with pytest.raises(ValueError, match="count is .*whole number of at least 1"):
        learnt(L2PConfig, L2P).base_model.grow_pool(count)


def test_the_general_prompt_learns_in_the_first_task_alone():
    model = learnt(DualPromptConfig, EXPERTS, tasks=1, steps=1, train_g_prompts="first_task")
    general = model.base_model.pool.g_prompts.detach().clone()
    model.begin_task(["neu"])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
    step(model)
    optimizer.step()
    pool = model.base_model.pool
    assert torch.equal(pool.g_prompts, general) and not pool.g_prompts.requires_grad and pool.prompts.grad is not None


BAD = [
    (L2PConfig, {**L2P, "max_pool_size": 5}, "max_pool_size is 5, but the pool has 6 rows. Set it to 6 or more"),
    (L2PConfig, {**L2P, "growth_similarity": 1.5}, "growth_similarity is 1.5.*at least -1 and at most 1"),
    (L2PConfig, {**L2P, "growth_entropy": -0.1}, "growth_entropy is -0.1.*at least 0 and at most 1"),
    (L2PConfig, {**L2P, "growth_size": 0}, "growth_size is 0.*at least 1"),
    (L2PConfig, {**L2P, "grown": [3, -1]}, r"grown is \[3, -1\].*whole numbers of at least 1"),
    (L2PConfig, {**L2P, "init": "adapter"}, "init is 'adapter' and init_from None, but the two go together"),
    (L2PConfig, {**L2P, "init_from": "x"}, "init is 'uniform' and init_from 'x', but the two go together"),
    (L2PConfig, {**L2P, "init_noise": -1}, "init_noise is -1.*at least 0"),
    (L2PConfig, {**L2P, "growth": "adaptive", "use_prompt_mask": True}, "growth is 'adaptive'.*use_prompt_mask"),
    (
        CodaPromptConfig,
        {"query_source": "layer_cls", "key_init": "queries"},
        "key_init is 'queries', but keys meet the layer's own input",
    ),
    (
        CodaPromptConfig,
        {**SHARED_CODA, "query_source": "layer_cls", "growth": "adaptive"},
        "growth is 'adaptive', but keys meet.*Leave growth at its default",
    ),
    (
        CodaPromptConfig,
        {"components_per_task": None},
        "components_per_task and pool_size are both None.*Set pool_size",
    ),
    (DualPromptConfig, {"expert_choice": "key", "pool_size": None}, "pool_size is None.*expert_choice is 'key'"),
]


@pytest.mark.parametrize(("config_class", "fields", "message"), BAD)
def test_bad_settings_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)
