"""What begin_task does to head and pool, and what training can and cannot move afterwards."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from tuner_cases import (
    CASES,
    METHODS,
    adapter_parameters,
    begin,
    config,
    images,
    labels,
    logits,
    prompted,
    step,
    task_names,
    tiny,
)


every_case = pytest.mark.parametrize("name", CASES)
every_method = pytest.mark.parametrize("name", METHODS)


def head(model):
    return model.base_model.head.active


def pool(model):
    return model.base_model.pool


def train(model, steps: int = 3) -> None:
    """AdamW with a weight decay that moves everything it is given."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        step(model)
        optimizer.step()
    model.eval()


# ----------------------------------------------------------------------------------------------- head and labels


@every_case
def test_new_classes_get_rows_and_old_rows_stay(name):
    model = prompted(name, tasks=1)
    before = {key: value.clone() for key, value in head(model).state_dict().items()}
    model.begin_task(["zebra"])
    assert head(model).out_features == 4 and head(model).weight.requires_grad
    for key, value in head(model).state_dict().items():
        assert torch.equal(value[:3], before[key])
    assert model.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2", 3: "zebra"}
    assert model.config.label2id["zebra"] == 3 and model.config.num_labels == 4
    facts = model.peft_config["default"]
    assert facts.classes == ["class 0", "class 1", "class 2", "zebra"] and facts.tasks == [[0, 1, 2], [3]]
    assert logits(model).shape == (4, 4)


@every_case
def test_known_classes_add_no_row(name):
    """Domain-incremental learning: the same classes in another task."""
    model = prompted(name)
    before = head(model).weight.detach().clone()
    model.begin_task(["class 4", "class 1", "new"])
    assert model.peft_config["default"].tasks == [[0, 1, 2], [3, 4, 5], [4, 1, 6]]
    assert torch.equal(head(model).weight[:6], before) and head(model).out_features == 7
    model.begin_task(task_names(0))
    assert model.peft_config["default"].tasks[-1] == [0, 1, 2] and head(model).out_features == 7
    assert torch.isfinite(step(model))


def test_a_task_of_one_class_can_be_learnt():
    """The base model's own loss would take a single label for a regression."""
    model = get_peft_model(tiny(), config("coda"))
    model.begin_task(["only"])
    assert step(model) == 0.0
    model.begin_task(["another"])
    assert step(model) == 0.0 and model.config.num_labels == 2


@pytest.mark.parametrize(("init", "expected"), [("zeros", 0.0), ("trunc_normal", 0.02)])
def test_new_rows_begin_as_configured(init, expected):
    model = get_peft_model(tiny(), config("l2p", head_init=init))
    model.begin_task([f"class {index}" for index in range(200)])
    assert head(model).weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not head(model).bias.any()


@pytest.mark.parametrize("labels_of_base", [0, 2, 1000])
def test_the_base_models_own_classifier_does_not_matter(labels_of_base):
    model = prompted("l2p", tiny(num_labels=labels_of_base))
    assert logits(model).shape == (4, 6) and model.config.num_labels == 6
    assert torch.isfinite(step(model))


# ----------------------------------------------------------------------------------------------- masks


@every_case
def test_training_sees_the_task_and_evaluation_the_classes_seen(name):
    model = prompted(name).train()
    assert torch.isneginf(model(images()).logits).tolist() == [[True] * 3 + [False] * 3] * 4
    assert torch.isfinite(logits(model.eval())).all()
    by_task = logits(model, task_ids=torch.tensor([0, 1, 0, 1]))
    assert torch.isneginf(by_task).tolist() == [[False] * 3 + [True] * 3, [True] * 3 + [False] * 3] * 2
    assert torch.equal(by_task.nan_to_num(neginf=0), by_task.isfinite() * logits(model))
    assert torch.equal(logits(model, task_ids=[0, 1, 0, 1]), by_task)


def test_without_train_mask_training_sees_all_classes():
    model = prompted("dualprompt", train_mask=False).train()
    output = model(images(), labels=torch.tensor([0, 1, 4, 5]))
    assert torch.isfinite(output.logits).all()
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 4, 5]))
    torch.testing.assert_close(model.base_model.head.last_losses["cross_entropy"], expected)


@every_case
def test_the_loss_is_the_masked_cross_entropy_and_the_pools_terms(name):
    model = prompted(name).train()
    output = model(images(), labels=labels(model))
    parts = model.base_model.head.last_losses
    expected = torch.nn.functional.cross_entropy(output.logits[:, 3:], labels(model) - 3)
    torch.testing.assert_close(parts["cross_entropy"], expected)
    torch.testing.assert_close(sum(parts.values()), output.loss.detach())
    terms = {
        "l2p": {"pull"},
        "dualprompt": {"pull"},
        "dualprompt-general": set(),
        "dualprompt-textbook": {"pull", "separation"},
        "coda-paper": {"orthogonality"},
        "coda-textbook": {"orthogonality", "entropy"},
        "coda-shared": {"orthogonality", "entropy"},
    }
    method = name if name in terms else name.split("-")[0].rstrip("+")
    assert set(parts) - {"cross_entropy"} == (terms.get(method, set()) if name != "coda-layer-mean" else set())
    model.eval()(images(), labels=labels(model))
    assert set(model.base_model.head.last_losses) == {"cross_entropy"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": [0, 3, 4, 5]}, r"labels hold the classes \[0\].*loss would be infinite.*train_mask=False"),
        ({"labels": [-1, 3, 4, 5]}, "labels reach from -1 to 5.*knows the classes 0 to 5.*begin_task"),
        ({"labels": [3, 4, 5, 12]}, "labels reach from 3 to 12.*knows the classes 0 to 5"),
        ({"labels": [[0.0] * 6] * 4}, r"shape \(4, 6\) and dtype torch.float32, but must be class indices"),
        ({"task_ids": [0, 1, 2, 0]}, r"task_ids holds \[2\], but the active adapter has begun 2 tasks"),
        ({"task_ids": [0, -1, 0, 0]}, r"task_ids holds \[-1\]"),
        ({"task_ids": [1]}, r"task_ids have shape \(1,\).*for each of the 4 images"),
        ({"task_ids": [0.0, 1.0, 0.0, 0.0]}, "task_ids have shape.*dtype torch.float32"),
        ({"query": [[0.5] * 24]}, r"query has shape \(1, 24\).*for each of the 4 images"),
    ],
)
def test_wrong_labels_are_refused(inputs, message):
    model = prompted("coda").train()
    with pytest.raises(ValueError, match=message):
        model(images(), **{name: torch.tensor(value) for name, value in inputs.items()})


def test_the_base_model_has_no_tasks():
    model = prompted("l2p")
    with model.disable_adapter(), pytest.raises(ValueError, match="no adapter is active"):
        model(images(), task_ids=torch.zeros(4))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "class_names is empty"),
        ("cat", "class_names is the string 'cat', but must be a list"),
        (["cat", "dog", "cat"], r"class_names repeats \['cat'\]"),
        ([1, 2], r"class_names holds \[1, 2\], but names are strings.*str\(\)"),
    ],
)
def test_wrong_names_are_refused_and_nothing_has_begun(names, message):
    model = prompted("coda")
    before = {key: value.shape for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.begin_task(names)
    assert model.peft_config["default"].num_tasks == 2
    assert {key: value.shape for key, value in model.state_dict().items()} == before


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("l2p", {"use_prompt_mask": True}, r"pool_size is 6.*task 4 needs 8 rows \(top_k 2.*Enlarge pool_size"),
        ("dualprompt", {"pool_size": 3}, "pool_size is 3, but task 4 needs a row of its own.*set it to None"),
        ("coda", {"pool_size": 7}, "pool_size is 7, but task 4 needs 8 components.*let the pool grow"),
    ],
)
def test_a_pool_too_small_for_the_task_is_refused(name, overrides, message):
    model = prompted(name, tasks=3, **overrides)
    with pytest.raises(ValueError, match=message):
        model.begin_task(["one more"])
    assert model.peft_config["default"].num_tasks == 3 and logits(model).shape == (4, 9)


# ----------------------------------------------------------------------------------------------- rows of the pool


@pytest.mark.parametrize("name", ["dualprompt", "dualprompt-coda", "dualprompt-textbook"])
@pytest.mark.parametrize("shared", [True, False])
def test_dualprompt_starts_a_task_from_the_row_before(name, shared):
    model = prompted(name, shared_prompt_pool=shared)
    prompts, keys, general = (getattr(pool(model), part).detach().clone() for part in ("prompts", "keys", "g_prompts"))
    model.begin_task(task_names(2))
    assert torch.equal(pool(model).prompts, prompts) == shared
    assert not torch.equal(pool(model).keys, keys)
    assert torch.equal(pool(model).past_prompts[..., 1, :, :], prompts[..., 0, :, :])
    assert torch.equal(pool(model).past_keys[:, 1], keys[:, 0])
    assert torch.equal(pool(model).g_prompts, general)
    assert pool(model).rows_in_use == model.peft_config["default"].rows_in_use == 3


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("dualprompt", "coda"))])
def test_rows_of_past_tasks_cannot_be_moved(name):
    """Neither by gradients nor by weight decay nor by momentum: they are in no optimizer."""
    model = prompted(name)
    past = {key: value.clone() for key, value in model.state_dict().items() if ".past_" in key}
    current = {key: value.detach().clone() for key, value in adapter_parameters(model).items()}
    train(model)
    for key, value in model.state_dict().items():
        if key in past:
            assert torch.equal(value, past[key]) and past[key].numel() > 0, key
    for key, value in adapter_parameters(model).items():
        assert not torch.equal(value, current[key]), key


@pytest.mark.parametrize("name", ["coda", "coda-paper", "coda-textbook", "coda-layer-mean"])
def test_coda_rows_of_past_tasks_take_part(name):
    """They are part of the sum, or of the choice, in training and at test."""
    model = prompted(name)
    for mode in (True, False):
        before = logits(model.train(mode))
        with torch.no_grad():
            pool(model).past_keys.neg_()
            pool(model).past_prompts.add_(1.0)
        assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["dualprompt", "dualprompt-coda"])
def test_dualprompt_trains_its_own_row_and_chooses_at_test(name):
    model = prompted(name, tasks=3)
    query = model.query(images())
    own = pool(model.train())(query).selected
    assert (own == 2).all()
    keys = pool(model).rows("keys")  # (sets, 3, D)
    expected = torch.nn.functional.cosine_similarity(query[None, :, None], keys[:, None], dim=-1).argmax(-1)
    assert torch.equal(pool(model.eval())(query).selected.reshape(expected.shape), expected)
    with torch.no_grad():
        pool(model).past_keys[:, 0] = query[0]
        pool(model).keys[:, 0] = query[1]
    assert pool(model)(query).selected.reshape(-1, 4)[0, :2].tolist() == [0, 2]


def test_the_choice_at_test_is_among_rows_of_tasks_seen():
    model = prompted("l2p", tasks=1, use_prompt_mask=True)
    with torch.no_grad():
        pool(model).keys[0, 4:] = model.query(images())[0]  # untrained rows with perfect keys
    assert pool(model).rows_in_use == model.peft_config["default"].rows_in_use == 2
    assert pool(model)(model.query(images())).selected.unique().tolist() == [0, 1]
    begin(model, 1)
    assert pool(model).rows_in_use == 4
    assert pool(model.train())(model.query(images())).selected.unique().tolist() == [2, 3]
    for name, rows in (("l2p", 6), ("dualprompt", 2), ("coda", 4), ("linear-probe", 0)):
        assert prompted(name).peft_config["default"].rows_in_use == rows


def test_l2p_starts_a_task_from_the_rows_before():
    model = prompted("l2p", tasks=1, shared_prompt_pool=True, use_prompt_mask=True)
    before = pool(model).prompts.detach().clone()
    model.begin_task(task_names(1))
    assert torch.equal(pool(model).prompts[:, 2:4], before[:, :2])
    assert torch.equal(pool(model).prompts[:, [0, 1, 4, 5]], before[:, [0, 1, 4, 5]])


def test_l2p_penalises_prompts_chosen_often_in_earlier_tasks():
    model = prompted("l2p", tasks=1, frequency_penalty=True)
    query = model.query(images())
    nearest = pool(model.eval())(query).selected
    first = pool(model.train())(query).selected
    assert torch.equal(first, nearest)  # nothing was chosen before
    counts = torch.bincount(first.flatten(), minlength=6)
    assert torch.equal(pool(model).chosen_now[0], counts.float()) and not pool(model).chosen_before.any()
    model.begin_task(task_names(1))
    assert torch.equal(pool(model).chosen_before[0], counts.float()) and not pool(model).chosen_now.any()
    second = pool(model)(query).selected
    distance = 1 - torch.nn.functional.cosine_similarity(query[:, None], pool(model).keys, dim=-1)
    penalised = distance * counts / counts.sum()  # the paper's gamma * h
    assert torch.allclose(penalised.gather(1, second).sum(1), penalised.sort(dim=1).values[:, :2].sum(1))
    assert torch.equal(pool(model.eval())(query).selected, nearest)


# ----------------------------------------------------------------------------------------------- the stock Trainer


def updates(name: str, folder, batch: int, accumulation: int, **training) -> dict[str, torch.Tensor]:
    """Update of every parameter by one optimizer step of the stock Trainer over the same four images."""
    model = prompted(name)
    before = {key: value.detach().clone() for key, value in adapter_parameters(model).items()}
    data = Dataset.from_dict({"pixel_values": images().tolist(), "labels": labels(model).tolist()}).with_format(
        "torch"
    )
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **training,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert set(trainer.evaluate()) >= {"eval_loss"}
    return {key: value.detach() - before[key] for key, value in adapter_parameters(model).items()}


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda-paper"])
def test_the_stock_trainer_accumulates_gradients_rightly(name, tmp_path):
    """The pool's terms are means over the batch; two half batches must not count them twice."""
    whole, halves = updates(name, tmp_path, 4, 1), updates(name, tmp_path, 2, 2)
    assert whole["base_model.model.vit.{}_pool.default.keys".format(name.replace("coda-paper", "codaprompt"))].any()
    for key, value in whole.items():
        torch.testing.assert_close(
            halves[key], value, atol=1e-6, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
    checkpointed = updates(name, tmp_path, 2, 2, gradient_checkpointing=True)
    for key, value in halves.items():
        torch.testing.assert_close(checkpointed[key], value)
