"""Adapters learnt apart make one that knows the classes of all, without training and without data."""

from __future__ import annotations

import copy

import pytest
import torch
from joining_cases import CHOOSING, FUSION, JOINABLE, LDA, answers, in_order, learn, learnt_apart
from observing_cases import check_close
from peft import PeftModel
from tuner_cases import config, images, task_names, tiny

from peft_cl import L2PConfig, join_adapters, split_adapter


#: PEFT looks for short names of adapters in the names of its methods.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter name")


NAMES = [name for task in range(4) for name in task_names(task)]
#: Heads that are computed from sums.
STATISTICS = {
    "ncm": {"head": "ncm"},
    "ncm, cosine": {"head": "ncm", "head_options": {"metric": "cosine", "normalize": True}},
    "lda": LDA,
    "lda by class": {"head": "lda", "head_options": {"by_class": True, "priors": "empirical"}},
    "kernel lda": {"head": "lda", "head_options": {"fourier": 50, "shrinkage": 0.1}, "head_features": "cls+mean"},
    "ridge": {"head": "ridge"},
    "ranpac": {"head": "ridge", "head_options": {"projection": 40}},
}


def facts(model: PeftModel, adapter: str) -> tuple:
    return model.peft_config[adapter].classes, model.peft_config[adapter].tasks


# ----------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("head", STATISTICS)
def test_statistics_on_frozen_features_are_those_of_the_sequence(head):
    model = learnt_apart("linear-probe", [(0, 1), (2, 3), (0, 1, 2, 3)], **STATISTICS[head])
    join_adapters(model, ["a", "b"], "ab")
    assert facts(model, "ab") == facts(model, "c")
    check_close(answers(model, "ab"), answers(model, "c"))
    join_adapters(model, ["b", "a"], "ba")
    check_close(in_order(answers(model, "ba"), facts(model, "ba")[0], NAMES), answers(model, "ab"))


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_trained_rows_stand_side_by_side(head):
    model = learnt_apart("linear-probe", head=head)
    if head == "cosine":  # each has learnt a scale of its own
        for name, scale in (("a", 4.0), ("b", 6.0)):
            model.base_model.head.entries[name].scale.data.fill_(scale)
    before = {name: answers(model, name) for name in "ab"}
    join_adapters(model, ["a", "b"], "ab")
    scales = (5 / 4, 5 / 6) if head == "cosine" else (1, 1)
    expected = torch.cat([before[name] * scale for name, scale in zip("ab", scales, strict=True)], dim=1)
    torch.testing.assert_close(answers(model, "ab"), expected)


def test_aligned_rows_are_aligned_anew():
    options = {"epochs": 2, "samples": 16}
    model = learnt_apart("linear-probe", head="aligned", head_options=options)
    join_adapters(model, ["a", "b"], "ab")
    head, parts = model.base_model.head.entries["ab"], [model.base_model.head.entries[name] for name in "ab"]
    assert head.gaussians.sums.images == sum(part.gaussians.sums.images for part in parts) > 0
    side_by_side = torch.cat([part.linear.weight for part in parts])
    assert head.linear.weight.shape == side_by_side.shape and not torch.allclose(head.linear.weight, side_by_side)


def test_a_class_of_both_adds_its_sums_or_has_the_mean_of_its_rows():
    model = learnt_apart("linear-probe", [(0,), (1,)], head="ncm")
    learn(model, "b", [0])  # the same images
    with pytest.warns(UserWarning, match="3 of 6 classes have the same sums in several of the adapters"):
        join_adapters(model, ["a", "b"], "ab")
    config = model.peft_config["ab"]
    assert (config.classes, config.tasks) == (NAMES[:6], [[0, 1, 2], [3, 4, 5], [0, 1, 2]])
    sums, own = (model.base_model.head.entries[name].sums for name in ("ab", "a"))
    assert torch.equal(sums.totals[:3], 2 * own.totals) and torch.equal(sums.counts[:3], 2 * own.counts)
    model = learnt_apart("linear-probe", [(0,), (1, 0)])
    join_adapters(model, ["a", "b"], "ab")
    rows = {name: model.base_model.head.entries[name].weight.detach() for name in ("a", "b", "ab")}
    assert torch.equal(rows["ab"], torch.cat([(rows["a"] + rows["b"][3:]) / 2, rows["b"][:3]]))


def test_fusion_joins_what_the_frozen_features_say_exactly():
    model = learnt_apart("coda", [(0, 1), (2, 3), (0, 1, 2, 3)], **FUSION)
    join_adapters(model, ["a", "b"], "ab")
    query = model.base_model.query(images())
    parts = [model.base_model.head.entries[name].query(query) for name in ("ab", "c")]
    check_close(*parts)


def test_the_temperature_and_the_sources_stay_as_they_were():
    model = learnt_apart("dualprompt", **LDA)
    model.peft_config["b"].temperature = 2.0
    before = {name: (answers(model, name), copy.deepcopy(facts(model, name))) for name in "ab"}
    model.set_adapter("b")
    join_adapters(model, ["a", "b"], "ab")
    assert model.active_adapter == "b" and model.base_model.active_adapters == ["b"]
    assert model.peft_config["ab"].temperature == 1.0 and model.peft_config["b"].temperature == 2.0
    for name, (expected, of_tasks) in before.items():
        assert torch.equal(answers(model, name), expected) and facts(model, name) == of_tasks


# ----------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("case", CHOOSING)
def test_an_image_of_a_known_adapter_gets_its_prompts(case):
    model = learnt_apart(case)
    expected = {name: answers(model, name) for name in "ab"}
    join_adapters(model, ["a", "b"], "ab")
    for place, name in enumerate("ab"):
        for task in range(2):
            known = torch.full((4,), 2 * place + task)
            columns = torch.tensor(model.peft_config["ab"].tasks[2 * place + task])
            found = answers(model, "ab", task_ids=known)[:, columns]
            torch.testing.assert_close(found, expected[name][:, columns - 6 * place])


@pytest.mark.parametrize("way", ["apart", "together"])
@pytest.mark.parametrize("settings", [{}, FUSION, {"task_evidence": 2.0}], ids=["papers", "first task", "evidence"])
@pytest.mark.parametrize("case", ["l2p", "l2p-deep", "dualprompt-coda", "coda", "linear-probe"])
def test_a_joined_adapter_is_saved_loaded_and_learns_on(case, settings, way, tmp_path):
    if case == "linear-probe" and settings is FUSION:
        settings = LDA
    model = learnt_apart(case, **settings)
    join_adapters(model, ["a", "b"], "ab", prompts=way)
    expected = answers(model, "ab")
    assert expected.shape == (4, 12) and facts(model, "ab")[1] == [[3 * t, 3 * t + 1, 3 * t + 2] for t in range(4)]
    model.save_pretrained(tmp_path, selected_adapters=["ab"])
    model.save_sums(tmp_path / "ab")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "ab", "ab", is_trainable=True)
    assert torch.equal(answers(loaded, "ab"), expected)
    learn(loaded, "ab", [4])
    assert answers(loaded, "ab").shape == (4, 15) and loaded.peft_config["ab"].num_tasks == 5
    loaded.train()
    labels = torch.tensor(loaded.peft_config["ab"].tasks[-1])[torch.arange(4) % 3]
    assert loaded(images(), labels=labels).loss.isfinite()


@pytest.mark.parametrize("case", ["l2p", "dualprompt", "coda"])
def test_learning_on_goes_on_with_the_last_adapter_and_leaves_the_others(case):
    model = learnt_apart(case)
    join_adapters(model, ["a", "b"], "ab")
    model.set_adapter("ab")
    pool, known = model.base_model.pool, torch.zeros(4, dtype=torch.long)

    def prompts_of_a() -> dict[int, torch.Tensor]:
        pool.eval().known_tasks = known
        with torch.no_grad():
            chosen = pool(model.base_model.query(images())).layers
        return {layer: each.tokens if each.keys is None else each.keys for layer, each in chosen.items()}

    before = prompts_of_a()
    learn(model, "ab", [4])
    assert all(torch.equal(rows, before[layer]) for layer, rows in prompts_of_a().items())
    assert len(pool.parts) == 2 and list(pool.parts[1].tasks) == [2, 3, 4]
    known += 4
    assert not any(torch.equal(rows, before[layer]) for layer, rows in prompts_of_a().items())


@pytest.mark.parametrize("case", CHOOSING)
def test_keys_choose_the_adapter(case):
    model = learnt_apart(case)
    pools = {name: model.base_model.encoder.entries[name] for name in "ab"}
    query = model.base_model.query(images())
    with torch.no_grad():  # keys that point to the images, and keys that point away from them
        for pool, sign in ((pools["a"], 1), (pools["b"], -1)):
            for name, rows in pool.state_dict().items():
                if name.endswith("keys"):
                    rows.copy_(sign * query.mean(0) + 0.1 * rows)
                if name.endswith("attention"):
                    rows.fill_(1.0)
    expected = {name: answers(model, name) for name in "ab"}
    for order in (["a", "b"], ["b", "a"]):
        new = "".join(order) + " again"
        join_adapters(model, order, new)
        found = answers(model, new)
        columns = in_order(found, facts(model, new)[0], facts(model, "a")[0])
        torch.testing.assert_close(columns, expected["a"])


def test_what_the_head_says_of_the_frozen_features_comes_before_the_keys():
    model = learnt_apart("dualprompt", [(0, 1), (2, 3)], **FUSION)
    join_adapters(model, ["a", "b"], "ab")
    model.set_adapter("ab")
    said = model.base_model.head.active.foretell(model.base_model.query(images(16)))
    is_b = said[:, :6].logsumexp(-1) < said[:, 6:].logsumexp(-1)
    answers(model, "ab", images(16))
    rows = model.base_model.head.last_selected[:, 0]
    assert 0 < is_b.sum() < 16, "images of both kinds"
    assert torch.equal(rows, is_b.long())


def test_general_prompts_are_kept_apart_or_averaged():
    model = learnt_apart("dualprompt", [(0,), (1,), (2,)])
    own = {name: model.base_model.encoder.entries[name].g_prompts.detach() for name in "abc"}
    join_adapters(model, ["a", "b"], "ab", prompts="together")
    join_adapters(model, ["ab", "c"], "together", prompts="together")  # two adapters, and one
    found = model.base_model.encoder.entries["together"].g_prompts
    torch.testing.assert_close(found, sum(own.values()) / 3)
    join_adapters(model, ["a", "b", "c"], "apart")
    pool = model.base_model.encoder.entries["apart"]
    assert torch.equal(pool.past_g_prompts, torch.stack([own["a"], own["b"]])) and torch.equal(
        pool.g_prompts, own["c"]
    )


def test_the_same_prompts_are_there_once():
    model = learnt_apart("l2p", [(0,)], train_prompts="first_task", **LDA)
    model.add_adapter("b", config("l2p", train_prompts="first_task", **LDA))
    with torch.no_grad():
        pools = [model.base_model.encoder.entries[name] for name in "ab"]
        pools[1].load_state_dict(pools[0].state_dict())
    model.set_adapter("b")
    model.begin_task(task_names(1))
    model.fit_head([{"pixel_values": images(6), "labels": torch.arange(6) % 3}])
    expected = {name: answers(model, name) for name in "ab"}
    join_adapters(model, ["a", "b"], "ab")
    config_ab, pool = model.peft_config["ab"], model.base_model.encoder.entries["ab"]
    assert config_ab.joined is None and pool.rows_in_use == pools[0].rows_in_use
    assert torch.equal(pool.prompts, pools[0].prompts) and expected["a"].shape == (4, 3)
    assert answers(model, "ab").shape == (4, 6)


def test_pools_of_several_sizes_and_growths_are_joined():
    model = learnt_apart("l2p", [(0,), (1,)], pool_size=6, max_pool_size=20, past_rows="frozen")
    model.set_adapter("b")
    model.base_model.grow_pool(3)
    join_adapters(model, ["a", "b"], "ab")
    facts = model.peft_config["ab"]
    assert (facts.total_rows, facts.grown, facts.past_count, facts.max_pool_size) == (15, [3], 12, 40)
    join_adapters(model, ["a", "b"], "together", prompts="together")
    assert model.peft_config["together"].past_count == 12
    model.set_adapter("ab")
    assert model.base_model.grow_pool(2) == 2 and model.base_model.pool.rows_in_use == 17


def test_rows_of_tasks_of_a_masked_pool_stand_in_front():
    model = learnt_apart("l2p", pool_size=8, use_prompt_mask=True, known_task_rows=True, frequency_penalty=True)
    join_adapters(model, ["a", "b"], "ab")
    pool, own = (model.base_model.encoder.entries[name] for name in ("ab", "b"))
    assert pool.rows_in_use == 8 and pool.rows("keys").shape[-2] == 16
    assert torch.equal(pool.rows("keys")[:, 4:8], own.rows("keys")[:, :4])
    learn(model, "ab", [4])
    assert pool.rows_in_use == 10


# ----------------------------------------------------------------------------------------------- refused


def test_what_cannot_be_joined_is_refused_with_both_values():
    model = learnt_apart("l2p", [(0,), (1,)])
    for name, settings in (
        ("longer", {"prompt_length": 4}),
        ("other head", {"head": "lda"}),
        ("frozen", {"train_prompts": "first_task"}),
        ("kept", {"similarity": "dot"}),
    ):
        model.add_adapter(name, config("l2p", **settings))
        learn(model, name, [2])
    for name, message in (
        ("longer", "prompt_length is 3 and 4"),
        ("other head", "head is 'linear' and 'lda'"),
        ("frozen", "train_prompts is 'every_task' and 'first_task'"),
        ("kept", "similarity is 'cosine' and 'dot'"),
    ):
        with pytest.raises(ValueError, match=f"'a' and {name!r} cannot be joined: .*{message}.*same settings"):
            join_adapters(model, ["a", name], "new")
    model.add_adapter("fresh", config("l2p"))
    model.peft_config["longer"].stream = True
    for names, new, message in (
        (["a"], "new", "must hold the names of two or more"),
        (["a", "a"], "new", "each once"),
        (["a", "no"], "new", "'no'.* is no adapter of this model, which has"),
        (["a", "fresh"], "new", "'fresh' has learnt no task yet"),
        (["a", "longer"], "new", "'longer' is learnt from a stream"),
        (["a", "b"], "b", "has an adapter 'b' already"),
        (["a", "b"], "a/b", "adapter's name is 'a/b'"),
    ):
        with pytest.raises(ValueError, match=message):
            join_adapters(model, names, new)
    with pytest.raises(ValueError, match="prompts is 'mixed', but must be one of 'apart', 'together'"):
        join_adapters(model, ["a", "b"], "new", prompts="mixed")
    assert "new" not in model.peft_config and "new" not in model.base_model.encoder.entries
    with pytest.raises(ValueError, match="carries no adapters by PEFT"):
        join_adapters(tiny(), ["a", "b"], "new")


def test_settings_of_training_alone_may_differ():
    model = learnt_apart("l2p", [(0,)])
    model.add_adapter("b", L2PConfig(pool_size=4, prompt_length=3, top_k=2, pull_coefficient=0.1, init="normal"))
    learn(model, "b", [1])
    join_adapters(model, ["a", "b"], "ab")
    assert model.peft_config["ab"].total_rows == 10 and model.peft_config["ab"].pull_coefficient == 0.5


def test_other_backbones_maps_and_ways_are_refused():
    model = learnt_apart("dualprompt", [(0,), (1,), (2,)])
    for name, digest in (("a", "1" * 16), ("b", "2" * 16)):
        model.peft_config[name].base_weights = {"bfloat16": digest}
    with pytest.raises(ValueError, match="learnt on backbones with different weights"):
        join_adapters(model, ["a", "b"], "new")
    model.peft_config["b"].base_weights = None
    join_adapters(model, ["a", "b"], "ab", prompts="together")
    with pytest.raises(ValueError, match="'ab' was joined with prompts='together'"):
        join_adapters(model, ["ab", "c"], "new", prompts="apart")
    model = learnt_apart("l2p-textbook", [(0,), (1,)])
    with pytest.raises(ValueError, match="query_projection is 'mlp' in both, but each has learnt its own"):
        join_adapters(model, ["a", "b"], "new")
    model = learnt_apart("dualprompt-general", [(0,), (1,)])
    with pytest.raises(ValueError, match="no keys meet a query.*Set prompts='together'"):
        join_adapters(model, ["a", "b"], "new", prompts="apart")


def test_missing_sums_are_asked_for_and_nothing_is_left_behind(tmp_path):
    model = learnt_apart("linear-probe", [(0,), (1,)], **LDA)
    model.save_pretrained(tmp_path, selected_adapters=["a", "b"])
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a", "a")
    loaded.load_adapter(str(tmp_path / "b"), "b")
    with pytest.raises(ValueError, match="needs them, but there is no head_sums.safetensors beside it"):
        join_adapters(loaded, ["a", "b"], "ab")
    assert list(loaded.peft_config) == ["a", "b"]
    for name in "ab":  # the remedy
        model.set_adapter(name)
        model.save_sums(tmp_path / name)
    join_adapters(loaded, ["a", "b"], "ab")
    assert answers(loaded, "ab").shape == (4, 6)


def test_a_failure_on_the_way_leaves_no_adapter(monkeypatch):
    model = learnt_apart("coda", [(0,), (1,)])
    pool = type(model.base_model.encoder.entries["a"])
    monkeypatch.setattr(pool, "take", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        join_adapters(model, ["a", "b"], "ab")
    monkeypatch.undo()
    assert list(model.peft_config) == ["a", "b"]
    join_adapters(model, ["a", "b"], "ab")
    split_adapter(model, "ab", [0], "a again")
    assert answers(model, "a again").shape == (4, 3)


@pytest.mark.parametrize("case", JOINABLE)
def test_every_method_is_joined(case):
    model = learnt_apart(case, [(0,), (1,), (2,)])
    join_adapters(model, ["a", "b", "c"], "abc")
    assert answers(model, "abc").shape == (4, 9) and facts(model, "abc")[0] == NAMES[:9]
