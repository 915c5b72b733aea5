"""Methods that give each task parameters of its own: PackNet, and what holds for HAT too."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from isolating_cases import (
    GOLDEN,
    Watch,
    all_weights,
    check_resumes,
    check_same_run,
    make_whole,  # noqa: F401
    pixels,
)
from peft import AutoPeftModel
from safetensors.torch import load_file
from test_processes import check_same, run
from trainer_cases import whole_and_resumed
from transformers import TrainerCallback

from peft_cl import L2PConfig, LinearProbeConfig, Strategy, class_incremental, task_incremental
from peft_cl.strategies import packnet
from peft_cl.strategies.hat import HAT
from peft_cl.strategies.packnet import FREE, PackNet, network_of, pruned, steps_before_pruning, weights_of


METHODS = [PackNet, HAT]


def test_weights_are_pruned_as_the_authors_prune():
    """Golden: SparsePruner of github.com/arunmallya/packnet (de4ff7e), prune_perc 0.5, on a linear layer and a
    convolution, three tasks; between two prunings the task's own weights get the values `trained`."""
    golden = json.loads((GOLDEN / "packnet.json").read_text())
    for layer in (0, 1):
        weight = torch.zeros(len(golden["trained"][0][layer]))
        owner = torch.zeros_like(weight, dtype=torch.uint8)
        for task, (trained, owners) in enumerate(zip(golden["trained"], golden["owners"], strict=True), start=1):
            owner[owner == FREE] = task
            weight = torch.where(owner == task, torch.tensor(trained[layer]), weight)
            owner = pruned(weight, owner, task, golden["prune"])
            weight[owner == FREE] = 0
            assert owner.tolist() == owners[layer]
        for task, seen in enumerate(golden["seen"], start=1):
            assert (~packnet.unseen(owner, task)).long().tolist() == seen[layer]


def test_weights_of_the_same_size_are_pruned_to_the_same_share():
    """A weight that never had a gradient is still 0: the first of them go."""
    owner = pruned(torch.zeros(4, 2), torch.full((4, 2), 3, dtype=torch.uint8), 3, 0.5)
    assert owner.flatten().tolist() == [0, 0, 0, 0, 3, 3, 3, 3]


def test_when_a_task_is_pruned():
    assert steps_before_pruning(100, 0.33) == 67
    assert steps_before_pruning(8, 0) == 8
    assert steps_before_pruning(1, 0.9) == 1


@pytest.fixture
def packed(make):
    """A run of three tasks, and at the end of each: weights, owners, features and logits under the first task."""

    def look(trainer, task):
        encoder, model = trainer.tuner.encoder, trainer.model.eval()
        with torch.no_grad(), network_of(encoder, strategy.owners, 1):
            features = encoder(pixels()).last_hidden_state
            logits = model(pixel_values=pixels(), task_ids=torch.zeros(8, dtype=torch.long)).logits
        owners = {name: owner.clone() for name, owner in strategy.owners.items()}
        head = trainer.tuner.head.active
        # By the task's own rows alone: the order of sums in a product depends on its size.
        own = F.linear(features[:, 0], head.weight[:2], head.bias[:2])
        torch.testing.assert_close(own, logits[:, :2])
        return {"weights": all_weights(trainer), "owners": owners, "features": features, "logits": own}

    strategy, watch = PackNet(), Watch(look)
    trainer = make(strategy, watch)
    trainer.train()
    return trainer, strategy, watch.seen


def test_packnet_keeps_what_earlier_tasks_use_to_the_bit(packed):
    trainer, strategy, seen = packed
    encoder = trainer.tuner.encoder
    divided = {id(weight): name for name, weight in weights_of(encoder).items()}
    names = {name: divided.get(id(value)) for name, value in trainer.tuner.lasting_parameters().items()}
    assert sum(each is not None for each in names.values()) == 2 * 6 + 1  # q, k, v, o and the MLP's two; the patches
    for earlier, later in ((0, 1), (1, 2)):
        before, after = seen[earlier], seen[later]
        for name, value in before["weights"].items():
            if names[name] is None:  # biases, norms, positions; the head's rows of earlier tasks
                assert torch.equal(after["weights"][name][: len(value)], value), name
                continue
            owned, now = before["owners"][names[name]], after["owners"][names[name]]
            assert torch.equal(after["weights"][name][owned != FREE], value[owned != FREE])
            assert torch.equal(now[owned != FREE], owned[owned != FREE])  # no task takes another's
            assert (after["weights"][name][now == later + 1] != 0).float().mean() > 0.5  # and has its own
    for later in seen[1:]:
        assert torch.equal(later["features"], seen[0]["features"])
        assert torch.equal(later["logits"], seen[0]["logits"])


def test_the_free_share_is_prune_to_the_power_of_the_tasks(packed):
    trainer, strategy, seen = packed
    for tasks, each in enumerate(seen, start=1):
        for name, owner in each["owners"].items():
            assert (owner == FREE).sum().item() == pytest.approx(owner.numel() * 0.5**tasks, abs=1)
            assert set(owner.unique().tolist()) == set(range(tasks + 1)), name
    for name, weight in weights_of(trainer.tuner.encoder).items():
        assert not weight[strategy.owners[name] == FREE].any()
    size = sum(weight.numel() for weight in weights_of(trainer.tuner.encoder).values())
    assert trainer.strategy.kept_bytes(trainer) == {"masks": size}


def test_each_task_is_measured_with_its_own_network(packed, make):
    """So nothing is forgotten; and what is saved gives the same network to others."""
    trainer, strategy, seen = packed
    matrix = trainer.accuracy_matrix
    for task in range(3):
        assert (matrix[task:, task] == matrix[task, task]).all()
    folder = trainer.folder
    with torch.no_grad():
        for task in range(3):
            ids = torch.full((8,), task)
            with network_of(trainer.tuner.encoder, strategy.owners, task + 1):
                expected = trainer.model.eval()(pixel_values=pixels(), task_ids=ids).logits
            model = AutoPeftModel.from_pretrained(folder).eval()
            packnet.apply_task(model, folder, task)
            assert torch.equal(model(pixel_values=pixels(), task_ids=ids).logits, expected)
            # Both ways from a batch of all tasks.
            batch = {"pixel_values": pixels().repeat(3, 1, 1, 1), "task_ids": torch.arange(3).repeat_interleave(8)}
            scores = strategy.predict(trainer, batch, trainer.model(**batch).logits)
            torch.testing.assert_close(scores[8 * task : 8 * task + 8], expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="task is 0, but the model was reduced to the network of task 2"):
        packnet.apply_task(model, folder, 0)
    model = AutoPeftModel.from_pretrained(folder)
    for task in (3, -1, True, "0"):
        with pytest.raises(ValueError, match="task is .*, but must be a whole number from 0 to 2"):
            packnet.apply_task(model, folder, task)
    with pytest.raises(ValueError, match="has no packnet_masks.safetensors, which PackNet writes"):
        packnet.apply_task(model, folder / "_state", 0)
    with pytest.raises(ValueError, match="model is a ViTForImageClassification, but must be a saved adapter"):
        packnet.apply_task(model.get_base_model(), folder, 0)


def test_packnet_measures_earlier_tasks_within_a_task(make):
    """Before the pruning and after it: the second task's weights are no part of the first one's network."""
    trainer = make(PackNet(), num_tasks=2, eval_strategy="steps", eval_steps=3)
    trainer.train()
    found = [log["eval_accuracy_task_0"] for log in trainer.state.log_history if "eval_accuracy_task_0" in log]
    first = trainer.accuracy_matrix[0, 0]
    assert len(found) >= 3 and set(found[-3:]) == {first}


def test_packnet_prunes_once_and_trains_the_rest_on(make):
    steps = []

    class EachStep(Strategy):
        def after_step(self, trainer):
            weights, strategy = weights_of(trainer.tuner.encoder), trainer.strategy.strategies[1]
            zeros = sum((weight == 0).sum().item() for weight in weights.values())
            steps.append((strategy.pruned, zeros, {name: weight.clone() for name, weight in weights.items()}))

    trainer = make(PackNet(0.75, 0.5), EachStep())
    trainer.train_task(trainer.scenario[0])
    assert [done for done, *_ in steps] == [False] * 3 + [True] * 5
    size = sum(weight.numel() for weight in steps[0][2].values())
    assert all(zeros < size / 100 for _, zeros, _ in steps[:3])
    assert all(zeros == pytest.approx(0.75 * size, rel=1e-3) for _, zeros, _ in steps[3:])
    name, before = next(iter(steps[3][2].items()))
    assert not torch.equal(before, steps[7][2][name]) and torch.equal(before == 0, steps[7][2][name] == 0)


def test_a_task_that_is_stopped_early_is_pruned_at_its_end(make):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    strategy = PackNet()
    trainer = make(strategy, callbacks=[Stop()], num_tasks=2)
    trainer.train()
    assert strategy.pruned and trainer.state.global_step == 1
    for name, weight in weights_of(trainer.tuner.encoder).items():
        assert (strategy.owners[name] == FREE).sum() == pytest.approx(weight.numel() / 4, abs=1)
        assert not weight[strategy.owners[name] == FREE].any()


@pytest.mark.parametrize("step", [3, 6])  # it is pruned after step 5
def test_the_best_checkpoint_brings_its_masks(step, make, data):
    class Best(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - step)

    strategy = PackNet()
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    choosing = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "validation": data["test"]}
    trainer = make(strategy, num_tasks=2, max_steps=8, callbacks=[Best()], **settings, **choosing)
    trainer.train()
    assert trainer.state.best_global_step == step
    for name, weight in weights_of(trainer.tuner.encoder).items():
        free = strategy.owners[name] == FREE
        assert free.sum() == pytest.approx(weight.numel() / 4, abs=1) and not weight[free].any()


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 6])  # before the pruning and after it
def test_packnet_goes_on_in_the_middle_of_a_task(step, make):
    check_resumes(make, PackNet, task=1, step=step)


@pytest.mark.parametrize("kind", METHODS)
def test_isolating_methods_go_on_after_a_task(kind, make):
    whole, again = whole_and_resumed(lambda **more: make(kind(), **more))
    check_same_run(again, whole)


def test_packnet_has_weights_for_so_many_tasks(make, make_trainer, data):
    with pytest.raises(
        ValueError, match=r"prune is 0.01 and the scenario has 4 tasks.*Give a larger prune, such as 0.5"
    ):
        make(PackNet(0.01), scenario=task_incremental(data, classes_per_task=[3, 1, 1, 1]))
    # What is full on the way is told before the task is trained.
    strategy = PackNet(0.5)
    trainer = make(strategy, num_tasks=2)
    trainer.train_task(trainer.scenario[0])
    for owner in strategy.owners.values():
        owner[owner == FREE] = 1
    with pytest.raises(
        ValueError, match="1 tasks are learnt, but PackNet has no weights left for 'task_1'.*larger prune"
    ):
        trainer.train_task(trainer.scenario[1])


# --------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("kind", METHODS)
def test_what_the_methods_are_not_defined_for(kind, make, make_trainer, data):
    name = kind.name
    with pytest.raises(ValueError, match=rf"task_known is False\), but {name} has one network.*task_incremental"):
        make(kind(), scenario=class_incremental(data, 3))
    with pytest.raises(ValueError, match=f"train_mask is False, but {name} keeps.*Set train_mask=True"):
        make(kind(), config=LinearProbeConfig(train_mask=False))
    with pytest.raises(ValueError, match=f"The adapter is L2PModel .*, but {name} divides.*LinearProbeConfig"):
        make(kind(), config=L2PConfig(pool_size=6, prompt_length=2, top_k=2))
    with pytest.raises(
        ValueError, match=rf"The backbone is frozen, but {name} .*\[FineTuning\(\), {kind.__name__}\(\)"
    ):
        make_trainer(LinearProbeConfig(), scenario=task_incremental(data, 3), strategy=kind())
    with pytest.raises(ValueError, match=f"head is 'lda', which is computed.*{name} keeps the rows"):
        make(kind(), config=LinearProbeConfig(head="lda"))
    again = task_incremental(data, 3).with_task(data)
    with pytest.raises(ValueError, match=f"class 'red' is in more than one task, but under {name} each task"):
        make(kind(), scenario=again)


@pytest.mark.parametrize("kind", METHODS)
def test_a_strategy_begins_anew_and_goes_on_with_its_own_adapter(kind, make, make_trainer, data):
    strategy = kind()
    found = []
    for folder in ("first", "second"):
        trainer = make(strategy, folder=folder, num_tasks=2, num_train_epochs=1)
        trainer.train()
        found.append(all_weights(trainer))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    # The same adapter learns more: with the strategy that knows its tasks, and with no other.
    more = {split: images.filter(lambda row: row["label"] < 2) for split, images in data.items()}
    names = ["crimson", "lime", "navy", "gold", "teal", "pink"]  # two of them have images
    feature = more["train"].features.copy()
    feature["label"].names[:] = names
    more = {split: images.cast(feature) for split, images in more.items()}
    settings = {
        "scenario": task_incremental(more, 1, class_order=names[:2]),
        "model": trainer.model,
        "folder": "third",
    }
    with pytest.raises(ValueError, match=f"has learnt 2 tasks and this {kind.name} 0.*or a new adapter"):
        make(kind(), **settings)
    third = make(strategy, **settings)
    third.train()
    assert strategy.tasks_known == 3
    assert third.tuner.head.config.num_tasks == 3


def test_bad_settings():
    for settings, rule in (
        *(
            ({"prune": value}, "prune is .*, but must be a number above 0 and below 1")
            for value in (0, 1, True, "0.5")
        ),
        *(({"retrain": value}, "retrain is .*, but must be a number of at least 0") for value in (-0.1, 1.0, None)),
        ({"prune": float("nan")}, "prune is nan"),
    ):
        with pytest.raises(ValueError, match=rule):
            PackNet(**settings)
    for name, values in {
        "smax": (1, float("inf"), float("nan"), True),
        "strength": (-1, "1", float("inf")),
        "embedding_rate": (0, float("nan"), None),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} is .*, but must be a number .*Give one such as"):
                HAT(**{name: value})
    assert PackNet(np.float64(0.25), 0).settings() == {"prune": 0.25, "retrain": 0}
    assert HAT(np.int64(100)).settings() == {"smax": 100, "strength": 0.75, "embedding_rate": 0.05}


def test_names_in_tables(make):
    assert make(PackNet()).results.method == "Fine-tuning + PackNet"
    assert make(HAT(), folder="hat").results.method == "Fine-tuning + HAT"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["probe+finetuning+packnet+uneven", "probe+finetuning+hat+uneven"])
def test_two_processes_equal_one(method, tmp_path):
    for processes, folder in ((1, "one"), (2, "two")):
        run(processes, tmp_path / folder, method, PLAIN="1")
    check_same(tmp_path / "two", tmp_path / "one", 1e-4, 1e-3)
    for file in ("backbone/model.safetensors", "packnet_masks.safetensors", "hat_gates.safetensors"):
        if (tmp_path / "one" / file).is_file():
            found, expected = (load_file(tmp_path / folder / file) for folder in ("two", "one"))
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "two" / f"{'packnet_masks' if 'packnet' in method else 'hat_gates'}.safetensors").is_file()
