"""Several adapters in one batch: each image has the answer of its own adapter, in columns that have names."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tuner_cases import CASES, METHODS, begin, config, images, logits, prompted, tiny


NAMES = ["second", "default", "__base__", "default", "second", "second"]
BATCH = images(6)


def pair(name, base="vit"):
    """A model with the adapters `default`, of 6 classes, and `second`, of 3, one of which is `default`'s too."""
    model = prompted(name, base)
    model.add_adapter("second", config(name))
    model.set_adapter("second")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model.begin_task(["class 4", "owl", "bat"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    model.set_adapter("default")
    return model.eval()


def expected(model, names=NAMES, **inputs):
    """Each image asked alone of its adapter: (classes, logits)."""
    answers, active = [], model.active_adapter
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                answers.append((list(model.config.id2label.values()), logits(model, BATCH[row : row + 1])[0]))
            continue
        model.set_adapter(name)
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        answers.append((list(model.config.id2label.values()), logits(model, BATCH[row : row + 1], **own)[0]))
    model.set_adapter(active)
    return answers


def check(model, answer, names=NAMES, **inputs):
    columns = model.base_model.mixed_classes(names)
    assert answer.shape == (len(names), len(columns))
    for row, (classes, values) in zip(answer, expected(model, names, **inputs), strict=True):
        own = [columns.index(name) for name in classes]
        torch.testing.assert_close(row[own], values, rtol=1e-5, atol=1e-5)
        assert row[[column for column in range(len(columns)) if column not in own]].isneginf().all()


@pytest.mark.parametrize("name", CASES)
def test_each_image_has_the_answer_of_its_adapter(name):
    model = pair(name)
    before = logits(model)
    answer = logits(model, BATCH, adapter_names=NAMES)
    check(model, answer)
    classes = [f"class {row}" for row in range(6)] + ["owl", "bat"] + [f"LABEL_{row}" for row in range(12)]
    assert model.base_model.mixed_classes(NAMES) == classes  # as they were loaded, a shared name once, the base last
    assert torch.equal(logits(model), before) and model.active_adapters == ["default"]
    assert model.config.id2label == dict(enumerate(classes[:6]))
    assert {key for key, value in model.named_parameters() if value.requires_grad and ".second." in key} == set()


@pytest.mark.parametrize("name", METHODS)
def test_of_one_adapter_it_is_a_usual_call(name):
    model = pair(name)
    assert torch.equal(logits(model, BATCH, adapter_names=["default"] * 6), logits(model, BATCH))
    check(model, logits(model, BATCH, adapter_names=["second"] * 6), ["second"] * 6)
    with model.disable_adapter():
        alone = logits(model, BATCH)
    assert torch.equal(logits(model, BATCH, adapter_names=["__base__"] * 6), alone)
    (answer,) = model(BATCH, adapter_names=NAMES, return_dict=False)
    assert torch.equal(answer, model(pixel_values=BATCH, adapter_names=NAMES).logits)


def test_tasks_and_queries_of_the_images_go_with_them():
    model = pair("coda")
    names = ["second", "default", "default", "second"]
    task_ids = torch.tensor([0, 1, 0, 0])
    batch = BATCH[:4]
    answer = model(batch, adapter_names=names, task_ids=task_ids, query=model.query(batch)).logits
    check(model, answer, names, task_ids=task_ids)
    again = model(batch, adapter_names=names, task_ids=task_ids.tolist()).logits
    torch.testing.assert_close(again, answer)  # not to the bit: the query pass is left out above


def test_a_head_that_is_computed_and_its_temperature():
    model = pair("linear-probe")
    model.add_adapter("lda", config("linear-probe", head="lda"))
    model.set_adapter("lda")
    model.begin_task(["x", "y"])
    model.fit_head([{"pixel_values": images(20), "labels": torch.arange(20) % 2}])
    model.peft_config["lda"].temperature = 2.5
    names = ["lda", "second", "lda", "default", "lda", "second"]
    check(model.eval(), logits(model, BATCH, adapter_names=names), names)


def test_classes_of_one_name_stay_apart():
    """Two of ImageNet's classes are called crane."""
    base = tiny(num_labels=3, id2label={0: "crane", 1: "crane", 2: "ox"}, label2id={"crane": 1, "ox": 2})
    model = pair("l2p", base)
    assert model.base_model.mixed_classes(["__base__", "second"]) == ["class 4", "owl", "bat", "crane", "crane", "ox"]
    answer = logits(model, BATCH[:2], adapter_names=["__base__", "second"])
    with model.disable_adapter():
        torch.testing.assert_close(answer[0, 3:], logits(model, BATCH[:1])[0])


def test_a_bfloat16_backbone():
    base = tiny().bfloat16()
    model = pair("coda", base)
    answer = model(BATCH.bfloat16(), adapter_names=NAMES).logits
    assert answer.dtype == torch.float32 and answer[2].isfinite().sum() == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"adapter_names": ["second"] * 5},
            r"should be the same as the number of inputs, but got 5 and 6.*each image",
        ),
        (
            {"adapter_names": ["second", "c", "ox"] * 2},
            r"non-existing adapter\(s\): 'c', 'ox'.*'default', 'second'.*load_adapter",
        ),
        ({"adapter_names": NAMES, "labels": torch.zeros(6, dtype=torch.long)}, "has no loss.*Leave labels out"),
        ({"adapter_names": NAMES, "output_hidden_states": True}, "gives logits alone.*set_adapter"),
        ({"adapter_names": NAMES, "task_ids": torch.zeros(6, dtype=torch.long)}, "the base model has no tasks"),
    ],
)
def test_what_is_refused(words, message):
    model = pair("dualprompt")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        model(BATCH, **words)
    assert model.active_adapters == ["default"] and torch.equal(logits(model), before)


def test_training_is_refused():
    model = pair("coda").train()
    with pytest.raises(ValueError, match="in training mode.*model.eval()"):
        model(BATCH, adapter_names=NAMES)
    assert model(BATCH).logits.shape == (6, 6)


def test_who_has_no_classes_cannot_answer():
    model = pair("coda", tiny(num_labels=0))
    with pytest.raises(ValueError, match="'__base__' has no classes.*leave it out"):
        model(BATCH, adapter_names=NAMES)
    check(model, logits(model, BATCH[:2], adapter_names=["second", "default"]), ["second", "default"])


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_call_that_is_cut_off_leaves_no_trace(error, at):
    """In the first adapter's pass, and in later ones."""
    model = pair("coda")
    before, calls = logits(model), []

    def fail(*_):
        calls.append(1)
        if len(calls) == at:
            raise error

    hook = model.base_model.encoder.base_layer.embeddings.register_forward_hook(fail)
    with pytest.raises(type(error)):
        model(BATCH, adapter_names=NAMES)
    hook.remove()
    assert len(calls) == at and model.active_adapters == ["default"] and model.base_model.head.mixed is None
    assert torch.equal(logits(model), before)
    with ThreadPoolExecutor(1) as pool:  # another thread is not held up
        assert torch.equal(pool.submit(logits, model).result(timeout=60), before)
    check(model, logits(model, BATCH, adapter_names=NAMES))


def test_threads_with_mixed_and_usual_calls():
    model = pair("coda")
    mixed, usual = logits(model, BATCH, adapter_names=NAMES), logits(model, BATCH)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            words = [{"adapter_names": NAMES} if number % 2 else {} for number in range(30)]
            answers = list(pool.map(lambda each: logits(model, BATCH, **each), words))
    finally:
        sys.setswitchinterval(interval)
    for number, answer in enumerate(answers):
        assert torch.equal(answer, mixed if number % 2 else usual)
    assert threading.active_count() < 50 and model.base_model.encoder.lock.owner is None


def test_copies_mix_for_themselves():
    model = pair("l2p")
    twin = copy.deepcopy(model)
    begin(twin, 2)
    assert logits(twin.eval(), BATCH, adapter_names=NAMES).shape == (6, 8 + 3 + 12)
    check(model, logits(model, BATCH, adapter_names=NAMES))
