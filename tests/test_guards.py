"""What goes wrong without an error is told once, with figures and an option that helps when it is set."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from trainer_cases import CONFIGS
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_cl import (
    CodaPromptConfig,
    DualPromptConfig,
    L2PConfig,
    LinearProbeConfig,
    RunResults,
    class_incremental,
    domain_incremental,
    task_incremental,
)
from peft_cl.assets import default_backbone
from peft_cl.metrics.same_rows import same_rows, ways_to_other_rows
from peft_cl.strategies import FineTuning
from peft_cl.trainer import guards


@pytest.fixture
def said():
    """What the trainer's logger warns of, as a list that fills."""
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    logger, handler = logging.getLogger("peft_cl.trainer.trainer"), Keep(logging.WARNING)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def embedded():
    return AutoModelForImageClassification.from_pretrained(default_backbone(), dtype="float32").eval()


def about(said, words):
    return [text for text in said if words in text]


# ------------------------------------------------------------------------------------------------ before training


def test_a_random_backbone_is_told_and_a_trained_one_is_not(tiny_vit, embedded):
    text = guards.random_backbone(tiny_vit().vit)
    assert "randomly initialised: all 13 of its layer norms are exactly 1 and 0" in text  # 2 x 6 layers, and the last
    assert "AutoModelForImageClassification.from_pretrained(name)" in text and "model.name" in text
    assert guards.random_backbone(embedded.vit) is None
    touched = tiny_vit()
    with torch.no_grad():
        touched.vit.layernorm.bias[3] = 1e-6
    assert guards.random_backbone(touched.vit) is None
    assert guards.random_backbone(tiny_vit(num_hidden_layers=1).vit) is None  # too little to tell by


def test_a_random_backbone_is_told_when_the_trainer_is_made_and_once(make_trainer, said):
    trainer = make_trainer(CONFIGS["coda"](), num_train_epochs=1)
    assert len(about(said, "randomly initialised")) == 1
    trainer.train()
    assert len(about(said, "randomly initialised")) == 1
    assert not about(said, "not frozen")


def test_to_train_a_random_backbone_is_no_fault(make_trainer, said):
    make_trainer(LinearProbeConfig(), strategy=FineTuning())
    assert not said


def test_a_backbone_that_is_not_frozen(make_trainer, tiny_vit, said):
    model = get_peft_model(tiny_vit(), CONFIGS["coda"]())
    layer = model.base_model.encoder.base_layer.layers[0]
    layer.requires_grad_(True)
    make_trainer(None, model=model)
    (text,) = about(said, "not frozen")
    weights = sum(weight.numel() for weight in layer.parameters())
    assert f"{weights:,} weights in 16 tensors" in text
    # The remedies work.
    said.clear()
    make_trainer(CONFIGS["linear-probe"](), strategy=FineTuning(), folder="trained")
    model.base_model.encoder.base_layer.requires_grad_(False)
    make_trainer(None, model=model, folder="frozen")
    assert not about(said, "not frozen")


def test_a_small_pool_is_told_with_the_size_that_is_enough(make_trainer, said):
    make_trainer(L2PConfig(pool_size=5, prompt_length=2, top_k=2))
    (text,) = about(said, "pool is small")
    assert "5 prompts for 3 tasks" in text and "2 to 3 a task: set pool_size=6, or growth='every_task'" in text
    assert guards.small_pool(L2PConfig(pool_size=6), 3) is None
    assert guards.small_pool(L2PConfig(pool_size=5, growth="every_task"), 3) is None


def test_a_pool_that_tasks_do_not_share_is_never_small():
    own_rows = L2PConfig(pool_size=10, top_k=1, use_prompt_mask=True)
    of_first_task = L2PConfig.from_preset("best")
    for config in (own_rows, of_first_task, DualPromptConfig(), CodaPromptConfig(), LinearProbeConfig()):
        assert guards.small_pool(config, 10) is None


# ------------------------------------------------------------------------------------------------ collapse


def pool_of(config, rows, tiny_vit):
    """A pool whose prompts (layers, rows, L, D) are set."""
    model = get_peft_model(tiny_vit(), config)
    model.begin_task(["a", "b"])
    pool = model.base_model.pool
    with torch.no_grad():
        pool.prompts.copy_(rows)
    return pool


def test_mean_cosines_are_those_of_all_pairs(tiny_vit):
    config = CodaPromptConfig(components_per_task=4, prompt_length=2, layers=[0, 3])
    rows = torch.randn(2, 4, 2, 48, generator=torch.Generator().manual_seed(0)) + 0.3
    found = guards.cosines_of_rows(pool_of(config, rows, tiny_vit))
    for layer in range(2):
        flat = rows[layer].flatten(1).double()
        pairs = [F.cosine_similarity(flat[i], flat[j], dim=0) for i in range(4) for j in range(4) if i != j]
        assert found[layer].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_rows_of_past_tasks_are_compared_too_and_keys_and_values_are_one_row(tiny_vit):
    config = DualPromptConfig(prompt_length=2, g_prompt_length=2, shared_prompt_pool=False)
    model = get_peft_model(tiny_vit(), config)
    model.begin_task(["a", "b"])
    assert guards.cosines_of_rows(model.base_model.pool) is None  # one row
    model.begin_task(["c", "d"])
    pool = model.base_model.pool
    both = [rows[1].flatten() for rows in (pool.past_prompts, pool.prompts)]  # of the second layer
    assert guards.cosines_of_rows(pool)[1].item() == pytest.approx(F.cosine_similarity(*both, dim=0).item(), abs=1e-6)


def test_prompts_that_became_alike_are_told_of_and_named(tiny_vit):
    one = torch.randn(1, 1, 2, 48, generator=torch.Generator().manual_seed(0))
    rows = one + 0.1 * torch.randn(5, 6, 2, 48, generator=torch.Generator().manual_seed(1))
    rows[3] = one[0] + 0.01 * torch.randn(6, 2, 48, generator=torch.Generator().manual_seed(2))
    pool = pool_of(CodaPromptConfig(components_per_task=6, prompt_length=2), rows, tiny_vit)
    text = guards.collapse(pool, torch.full((5,), 0.2))
    assert "the 6 prompts of layer 3 have a mean cosine of 1.00, 0.20 when the task began (above 0.9)" in text
    assert "Set diversity_coefficient=0.1" in text
    CodaPromptConfig(diversity_coefficient=0.1)
    assert "when the task began" not in guards.collapse(pool, torch.ones(5))
    different = torch.randn(5, 6, 2, 48, generator=torch.Generator().manual_seed(3))
    assert guards.collapse(pool_of(pool.config, different, tiny_vit), torch.zeros(5)) is None


def test_a_copy_of_the_row_before_is_no_collapse(tiny_vit):
    model = get_peft_model(tiny_vit(), DualPromptConfig(prompt_length=2, g_prompt_length=2))
    for names in (["a"], ["b"], ["c"]):
        model.begin_task(names)
    pool = model.base_model.pool
    before = guards.cosines_of_rows(pool)
    assert before.min() > 0.999
    assert guards.collapse(pool, before) is None


def test_the_remedy_for_collapse_lowers_the_cosines(make_trainer, said):
    """A step that is the same for all prompts makes them alike; the term holds them apart."""
    found = {}
    for coefficient in (0.0, 0.1):
        config = L2PConfig(pool_size=6, prompt_length=2, top_k=6, init="normal", diversity_coefficient=coefficient)
        trainer = make_trainer(config, num_tasks=2, folder=f"run {coefficient}", optim="sgd", learning_rate=0.5)
        trainer.train()
        found[coefficient] = guards.cosines_of_rows(trainer.tuner.pool).max().item()
    assert found[0.1] < found[0.0]


# ------------------------------------------------------------------------------------------------ the query, the rows


def test_a_query_that_is_the_same_for_all_images(make_trainer, tiny_vit, said):
    torch.manual_seed(0)
    model = tiny_vit()
    with torch.no_grad():  # patches bring nothing, so that the CLS token has seen no image
        model.vit.embeddings.patch_embeddings.projection.weight.zero_()
    make_trainer(None, model=get_peft_model(model, CONFIGS["l2p"]()), max_steps=1).train()
    (text,) = about(said, "does not depend on the image")
    assert re.search(r"over a batch of 8 it varies by \S+ of its length, so that all images choose the same", text)
    assert "load a pretrained backbone" in text


def test_the_spread_of_a_query_is_over_images(tiny_vit):
    config = L2PConfig()
    query = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    assert guards.same_query(query, config) is None
    mean = torch.full((48,), 3.0)
    spread = np.sqrt(query.double().numpy().var(0, ddof=1).sum()) / np.sqrt(48 * 9)
    for factor in (2.0, 0.5):  # on both sides of the bound
        close = mean + query * (factor * guards.SAME_QUERY / spread)
        assert (guards.same_query(close, config) is None) == (factor > 1)
    assert guards.same_query(query[:1], config) is None
    early = guards.same_query(mean.expand(4, -1), L2PConfig(query_layer=0))
    assert "query_layer is 0" in early and "set it to a later layer, or to None" in early


def test_a_query_is_looked_at_without_a_pass_of_its_own(make_trainer, said):
    trainer = make_trainer(CONFIGS["l2p"](), num_tasks=2, num_train_epochs=1)
    trainer.train()
    assert trainer.guards.hook is None and not trainer.tuner.pool._forward_pre_hooks
    assert not about(said, "does not depend")


@pytest.mark.parametrize(
    ("counts", "choices", "told"),
    [
        ([[50, 50, 0, 0], [50, 50, 0, 0]], 2, "2 of 4 rows of the pool have 100.0 % of all choices of 2 tasks"),
        ([[995, 3, 2, 0]], 1, "1 of 4 rows of the pool have 99.5 % of all choices of 1 task"),
        ([[98, 2, 0, 0]], 1, None),
        ([[50, 50, 0, 0], [0, 0, 50, 50]], 2, None),
        ([[50, 50]], 2, None),  # the pool is as large as a choice
    ],
)
def test_few_rows_for_all_images(counts, choices, told):
    text = guards.few_rows(np.array(counts), choices, {})
    assert (text is None) if told is None else told in text


def test_what_helps_against_few_rows_can_be_set():
    settings = L2PConfig(pool_size=6, top_k=2).to_dict()
    text = ways_to_other_rows(settings, 5)
    assert "use_prompt_mask=True with pool_size=10 gives" in text
    L2PConfig(top_k=2, use_prompt_mask=True, pool_size=10)
    options = dict(re.findall(r"(\w+)=('\w+'|[\d.]*\d|True)", text.partition("Or spread")[2]))
    assert set(options) == {"frequency_penalty", "entropy_coefficient", "key_init"}
    for name, value in options.items():
        set_to = L2PConfig(top_k=2, **{name: eval(value)})
        assert name not in ways_to_other_rows(set_to.to_dict(), 5)
    assert ways_to_other_rows(CodaPromptConfig().to_dict(), 5) == ""
    stream = ways_to_other_rows(settings, 5, has_tasks=False)
    assert stream == " To spread the choices among shared rows: entropy_coefficient=0.1, key_init='queries'."
    L2PConfig(entropy_coefficient=0.1, key_init="queries").check_stream()


def test_a_run_whose_images_all_choose_the_same_is_told_once(make_trainer, said):
    """One query for all images, and so one choice."""
    trainer = make_trainer(L2PConfig(pool_size=6, prompt_length=2, top_k=2), num_train_epochs=1, num_tasks=2)
    with torch.no_grad():
        trainer.tuner.encoder.base_layer.embeddings.patch_embeddings.projection.weight.zero_()
    trainer.train()
    assert len(about(said, "choose the same prompts: 2 of 6 rows")) == 1
    assert not about(said, "Few prompts")


# ------------------------------------------------------------------------------------------------ losses, the head


def test_orthogonality_far_above_the_cross_entropy(make_trainer, said):
    config = CodaPromptConfig(components_per_task=4, prompt_length=4, orthogonality_coefficient=1000.0)
    trainer = make_trainer(config, num_train_epochs=1, learning_rates={"prompts": 0.5, "keys": 0.5, "attention": 0.5})
    trainer.train()
    (text,) = about(said, "orthogonality term")
    term, labels = map(float, re.search(r"term is (\S+) on average.*cross-entropy \((\S+)\)", text).groups())
    assert term > 10 * labels and "Lower orthogonality_coefficient" in text
    said.clear()
    mild = CodaPromptConfig(components_per_task=4, prompt_length=4, orthogonality_coefficient=0.01)
    make_trainer(mild, num_train_epochs=1, folder="mild").train()
    assert not about(said, "orthogonality")


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ({"cross_entropy": 0.5, "pull": 9.0, "orthogonality": 5.1}, "5.1 on average over the task, 10 times the"),
        ({"cross_entropy": 0.5, "orthogonality": 4.9}, None),
        ({"own_loss": 0.1, "orthogonality": 40.0}, "400 times the own-loss (0.1)"),
        ({"cross_entropy": 0.5}, None),
        ({}, None),
    ],
)
def test_the_term_is_compared_with_the_loss_of_the_labels(losses, told):
    text = guards.heavy_orthogonality(losses)
    assert (text is None) if told is None else told in text


def test_means_of_losses_are_over_the_task(make_trainer):
    """The same as a mean of what is logged at each step."""
    trainer = make_trainer(CONFIGS["l2p"](), num_tasks=1, num_train_epochs=1)
    found = []
    trainer.guards.after_task = lambda task: found.append((dict(trainer.guards.sums), trainer.guards.steps))
    trainer.train()
    sums, steps = found[0]
    logged = [log["cross_entropy"] for log in trainer.state.log_history if "cross_entropy" in log]
    assert steps == len(logged) == 12
    assert float(sums["cross_entropy"]) / steps == pytest.approx(np.mean(logged), rel=1e-5)


def test_a_head_that_forgets_is_told_where_another_would_not(data):
    scenario = class_incremental(data, 3)
    text = guards.forgetting_head(L2PConfig(), scenario, 0.35)
    assert "forgetting is 35.0 %, and head is 'linear'" in text and "Set head='lda'" in text and "'best'" in text
    assert guards.forgetting_head(L2PConfig(head="cosine"), scenario, 0.35)
    assert guards.forgetting_head(L2PConfig(head="lda"), scenario, 0.35) is None
    assert guards.forgetting_head(L2PConfig.from_preset("best"), scenario, 0.35) is None
    assert guards.forgetting_head(L2PConfig(), scenario, 0.05) is None
    assert guards.forgetting_head(L2PConfig(), scenario, float("nan")) is None
    assert guards.forgetting_head(L2PConfig(), task_incremental(data, 3), 0.35) is None


def test_domains_that_share_their_classes_need_no_other_head(data):
    split = {name: part.add_column("domain", ["plain", "dark"] * (len(part) // 2)) for name, part in data.items()}
    assert guards.forgetting_head(L2PConfig(), domain_incremental(split), 0.35) is None


def test_the_head_is_told_of_after_the_last_task_alone(make_trainer, said):
    trainer = make_trainer(CONFIGS["l2p"](), num_train_epochs=1)
    for task in trainer.scenario[:2]:
        trainer.train_task(task)
    assert not about(said, "head forgets")
    trainer.train_task(trainer.scenario[2])
    told = len(about(said, "head forgets"))
    assert told == (trainer.metrics["forgetting"] > 0.1)
    words = {"pool_size": 6, "prompt_length": 2, "top_k": 2, "head": "lda"}  # as it says
    again = make_trainer(L2PConfig(**words), num_train_epochs=1, folder="lda")
    again.train()
    assert (
        again.metrics["forgetting"] < trainer.metrics["forgetting"] and len(about(said, "head forgets")) == told == 1
    )


# ------------------------------------------------------------------------------------------------ nothing else changes


@pytest.mark.parametrize("name", ["l2p", "coda"])
def test_guards_change_nothing(name, make_trainer):
    """The same run without them, to the bit: weights, accuracies and random state."""
    found = []
    for watched in (True, False):
        trainer = make_trainer(CONFIGS[name](), folder=f"run {watched}", num_tasks=2)
        if not watched:
            trainer.remove_callback(trainer.guards)
            trainer.guards.after_task = lambda task: None
        trainer.train()
        weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        found.append((weights, trainer.accuracy_matrix, torch.get_rng_state()))
    (weights, matrix, state), (others, other_matrix, other_state) = found
    assert all(value.equal(others[key]) for key, value in weights.items())
    np.testing.assert_array_equal(matrix, other_matrix)
    assert state.equal(other_state)


def test_a_sound_run_is_quiet(make_trainer, embedded, said, data):
    """The embedded backbone, a head that does not forget, a pool that is large enough."""
    processor = AutoImageProcessor.from_pretrained(default_backbone())
    config = L2PConfig(pool_size=8, prompt_length=2, top_k=2, use_prompt_mask=True, head="lda")
    trainer = make_trainer(
        None, model=get_peft_model(embedded, config), processing_class=processor, num_tasks=2, num_train_epochs=1
    )
    trainer.train()
    assert said == []


def test_the_table_of_warnings_has_each_of_them(tiny_vit, data):
    """`docs/training.md` names a warning by its first words, and what helps as the warning does."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.partition("| warning |")[2].splitlines()[2:]]
    table = {row[0].removesuffix(" is ..."): row[2] for row in rows[:9]}
    pool = pool_of(CodaPromptConfig(components_per_task=3, prompt_length=2), torch.ones(5, 3, 2, 48), tiny_vit)
    unfrozen = tiny_vit().vit
    mask, scenario = L2PConfig(top_k=1).to_dict(), class_incremental(data, 3)
    facts = {"method": "L2P", "peft_type": "L2P", "base_model": "", "dataset": "", "seed": 0, "finished_tasks": 2}
    facts |= {"task_names": ["a", "b"], "accuracy_matrix": [[1.0, 0.0], [0.0, 1.0]], "test_sizes": [1, 1]}
    facts |= {"metrics": {}, "adapter_bytes": 1, "train_seconds": 0.0}
    facts |= {"trainable_parameters": 1, "total_parameters": 1}
    facts |= {"scenario": scenario.describe(), "hyperparameters": {"adapter": mask}}
    results = RunResults(prompt_usage=[[1, 0], [1, 0]], **facts)
    texts = [
        guards.random_backbone(unfrozen),
        guards.trained_backbone(unfrozen),
        guards.small_pool(L2PConfig(), 20),
        guards.same_query(torch.ones(4, 8), L2PConfig(query_layer=1)),
        guards.collapse(pool, None),
        guards.few_rows(np.array([[9, 0, 0], [9, 0, 0]]), 1, mask),
        same_rows(results),
        guards.heavy_orthogonality({"cross_entropy": 0.1, "orthogonality": 9.0}),
        guards.forgetting_head(L2PConfig(), scenario, 0.5),
    ]
    assert len(table) == len(texts)
    for (words, helps), text in zip(table.items(), texts, strict=True):
        assert text.startswith(words)
        options = [name for name in re.findall(r"[a-z]+_[a-z_]+", helps) if name != "from_pretrained"]
        assert all(name in text for name in options)
