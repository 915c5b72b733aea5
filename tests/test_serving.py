"""A session: classes taught without training, undone to the bit, forgotten without a trace, and saved whole."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from peft import PeftModel
from serving_cases import HEADS, METHODS, pictures, processor, session
from transformers import AutoImageProcessor
from tuner_cases import config, prompted, tiny
from tuner_cases import images as pixels_of

from peft_cl.serving import Session


def state(served: Session) -> dict:
    """All that a step may change: numbers to the bit, facts, and what the model says."""
    head, pool = served.tuner.head.active, served.tuner.pool
    facts = {name: getattr(served.config, name) for name in ("classes", "tasks", "temperature", "rows_in_use")}
    tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
    tensors |= {f"pool.{name}": value for name, value in pool.state_dict().items()} | head.going_on()
    tensors = {name: value.clone() for name, value in tensors.items()}
    with torch.no_grad():
        logits = served.model(pixel_values=pixels_of(3)).logits
    return {**facts, "labels": dict(served.model.config.id2label), **tensors, "logits": logits}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def named(served: Session, colour: str) -> list[str]:
    return [served.classify(image).prediction.names[0] for image in pictures(colour, 4, seed=1)]


@pytest.mark.parametrize("head", HEADS)
def test_a_class_is_known_at_once_and_undone_to_the_bit(head):
    served = session("l2p" if head == "fusion" else "linear-probe", head)
    before = state(served)
    taught = served.teach("  e ", pictures("e", 12))
    assert (taught.name, taught.images, taught.is_new) == ("e", 12, True) and 0 < taught.seconds < 60
    assert served.classes == (*"abcde",) and served.taught == ("e",) and served.can_undo and not served.is_saved
    assert named(served, "e") == ["e"] * 4
    for name in "abcd":
        assert named(served, name) == [name] * 4  # the others are unharmed
    served.teach("f", pictures("f"))
    with_two = state(served)
    served.teach("a", pictures("a", 3, seed=2))
    served.undo()
    assert_same(state(served), with_two)
    served.undo()
    served.undo()
    assert_same(state(served), before)
    assert not served.can_undo and served.is_saved and served.taught == ()
    with pytest.raises(ValueError, match="nothing to undo"):
        served.undo()


@pytest.mark.parametrize("method", METHODS)
def test_prompts_stay_as_they_are(method):
    """Each task of some methods brings rows of its own, which nobody would train."""
    served = session(method)
    pool = {name: value.clone() for name, value in served.tuner.pool.state_dict().items()}
    features = served._features(pictures("b"))[0]
    served.teach("e", pictures("e", 12))
    assert named(served, "e") == ["e"] * 4
    after = served.tuner.pool.state_dict()
    assert pool.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in pool.items())
    assert torch.equal(served._features(pictures("b"))[0], features)
    assert served.config.tasks == [[0, 1], [2, 3, 4]]


def test_a_taught_class_is_forgotten_without_a_trace():
    served, other = session(), session()
    for name in "efe":
        served.teach(name, pictures(name))
    served.forget("e")
    other.teach("f", pictures("f"))
    assert_same(state(served), state(other))
    served.undo()
    assert served.classes == (*"abcdef",) and served.taught == ("e", "f")


def test_a_class_that_the_adapter_came_with_is_forgotten_where_its_sums_are_apart():
    served = session(head="lda")
    before = state(served)
    with pytest.raises(ValueError, match="by_class"):
        served.forget("a")
    assert_same(state(served), before)
    assert not served.can_undo
    served = session(head="ncm")
    before = state(served)
    served.teach("e", pictures("e"))
    served.forget("a")
    assert served.classes == (*"bcde",)
    served.teach("a", pictures("a"))
    assert served.taught == ("e", "a")  # known anew, from these images alone
    served.forget("a")
    assert served.classes == (*"bcde",)
    for _ in range(4):
        served.undo()
    assert_same(state(served), before)


def test_more_images_of_a_known_class():
    served = session()
    counts = served.tuner.head.active.sums.counts.tolist()
    assert not served.teach("b", pictures("b", 5, seed=7)).is_new
    assert served.tuner.head.active.sums.counts.tolist() == [counts[0], counts[1] + 5, *counts[2:]]
    assert served.taught == () and served.can_undo


def test_a_step_that_fails_leaves_all_as_it_was(monkeypatch):
    served = session()
    served.teach("e", pictures("e"))
    before, head = state(served), type(served.tuner.head.active)
    with monkeypatch.context() as patch:
        fits = iter([KeyboardInterrupt()])

        def fit(self, own=head.fit):
            for fault in fits:
                raise fault
            own(self)

        patch.setattr(head, "fit", fit)
        with pytest.raises(KeyboardInterrupt):
            served.teach("f", pictures("f"))
    assert_same(state(served), before)
    assert served.teach("f", pictures("f")).is_new


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "has no name"),
        (" \n", "has no name"),
        (None, "has no name"),
        ("x" * 101, "101 letters, but may have 100"),
        ("a\x1b[2Jb", "letters that cannot be shown"),
        ("a\nb", "letters that cannot be shown"),
        ("\u202eabc", "letters that cannot be shown"),
    ],
)
def test_names_that_are_refused(name, expected):
    served = session()
    with pytest.raises(ValueError, match=expected):
        served.teach(name, pictures("e"))
    assert served.classes == (*"abcd",) and not served.can_undo


def test_what_else_is_refused():
    served = session()
    with pytest.raises(ValueError, match="no image of 'e'. Give at least one"):
        served.teach("e", [])
    with pytest.raises(ValueError, match="'x' is not known. Name one of"):
        served.forget("x")
    with pytest.raises(ValueError, match="learnt no classes yet"):
        Session(prompted("l2p", tasks=0), processor())
    with pytest.raises(ValueError, match="3 task names, but the adapter has 2 tasks"):
        Session(served.model, processor(), task_names=["a", "b", "c"])


def test_features_that_are_no_numbers_are_refused():
    served = session()
    with torch.no_grad():
        served.model.get_base_model().vit.base_layer.embeddings.cls_token.fill_(torch.nan)
    with pytest.raises(ValueError, match="--dtype float32"):
        served.teach("e", pictures("e"))
    assert not served.can_undo


@pytest.mark.parametrize("more", [{}, {"head": "fusion", "head_options": {"prompted": "linear", "query": "lda"}}])
def test_a_trained_head_says_what_can_be_taught(more):
    served = Session(prompted("l2p", **more), processor())
    assert "without training" in served.why_not and "'lda'" in served.why_not
    for action in (lambda: served.teach("e", pictures("e")), lambda: served.forget("class 0")):
        with pytest.raises(ValueError, match="takes nothing from images without training"):
            action()
    with pytest.raises(ValueError, match="learns a class by training alone"):
        served.model.add_classes(["e"])
    assert served.classify(pictures("a", 1)[0]).prediction.names


# ------------------------------------------------------------------------------------------------- saving


def load(folder, base=None, **words) -> PeftModel:
    return PeftModel.from_pretrained(base or tiny(), str(folder), **words).eval()


@pytest.mark.parametrize("head", ["lda", "fusion"])
def test_what_is_saved_is_what_answers(head, tmp_path):
    served = session("coda", head)
    served.teach("e", pictures("e"))
    folder = served.save(tmp_path / "a folder" / "taught")
    assert served.is_saved and folder == tmp_path / "a folder" / "taught"
    assert [path.name for path in folder.parent.iterdir()] == ["taught"]
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "head_sums.safetensors", "preprocessor_config.json")
    }
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    with torch.no_grad():
        expected = served.model(pixel_values=pixels_of(3)).logits
        assert torch.equal(load(folder)(pixel_values=pixels_of(3)).logits, expected)
    again = Session(load(folder, is_trainable=True), AutoImageProcessor.from_pretrained(folder))
    assert again.classes == (*"abcde",) and again.why_not is None
    again.teach("f", pictures("f", 12))  # it learns on
    assert named(again, "f") == ["f"] * 4
    again.forget("f")
    with torch.no_grad():
        assert torch.equal(again.model(pixel_values=pixels_of(3)).logits, expected)


def test_nothing_is_written_over_but_what_the_session_wrote(tmp_path):
    served = session()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("full", "file", "link"):
        with pytest.raises(FileExistsError, match="is there already"):
            served.save(tmp_path / name)
    assert not (tmp_path / "elsewhere").exists() and list((tmp_path / "full").iterdir()) == [
        tmp_path / "full/precious"
    ]
    served.save(tmp_path / "own")
    served.teach("e", pictures("e"))
    served.save(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["classes"] == [*"abcde"]
    with pytest.raises(FileExistsError):
        session().save(tmp_path / "own")
    served.undo()
    served.processor.save_pretrained = lambda folder: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        served.save(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["classes"] == [*"abcde"]
    assert not served.is_saved and not list(tmp_path.glob(".*"))


def test_a_backbone_beside_the_adapter_is_saved_too(tmp_path):
    backbone = tmp_path / "run" / "backbone"
    tiny().save_pretrained(backbone)
    served = session()
    served.config.base_model_name_or_path = str(backbone)
    folder = served.save(tmp_path / "taught")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "backbone"
    assert (folder / "backbone" / "model.safetensors").is_file() and (folder / "model.safetensors").is_file()
    assert served.config.base_model_name_or_path == str(backbone)


def test_an_adapter_without_its_sums_answers_and_says_what_is_missing(tmp_path):
    folder = session().save(tmp_path / "taught")
    (folder / "head_sums.safetensors").unlink()
    served = Session(load(folder, is_trainable=True), processor())
    assert "there is no head_sums.safetensors" in served.why_not
    assert served.classify(pictures("a", 1)[0]).prediction.names[0] == "a"
    with pytest.raises(ValueError, match=r"head_sums\.safetensors"):
        served.teach("e", pictures("e"))
    served = Session(load(session().save(tmp_path / "whole")), processor())
    assert "loaded for inference" in served.why_not


# ------------------------------------------------------------------------------------------------- answers


def test_the_task_and_the_prompts_of_an_answer():
    served = session("l2p")
    answer = served.classify(pictures("c", 1)[0])
    assert answer.task == "second" and sum(answer.prediction.probabilities) == pytest.approx(1, abs=1e-5)
    (choice,) = answer.choices
    assert choice.rows == tuple(served.tuner.head.last_selected[0].tolist()) and choice.weights is None
    assert choice.layers == (0,)
    served.teach("e", pictures("e", 12))
    assert served.classify(pictures("e", 1)[0]).task is None  # it was taught, and belongs to no task that was learnt
    assert served.classify(pictures("c", 1)[0]).task == "second"
    weighted = session("coda").classify(pictures("a", 1)[0])
    assert [choice.layers for choice in weighted.choices] == [(0,), (2,)]
    assert all(len(choice.rows) == len(choice.weights) == 3 for choice in weighted.choices)
    sizes = [abs(weight) for weight in weighted.choices[0].weights]
    assert sizes == sorted(sizes, reverse=True)
    assert session("linear-probe").classify(pictures("a", 1)[0]).choices == ()


def test_weights_of_coda_are_those_that_the_prompt_is_made_of():
    served = session("coda")
    batch = pixels_of(3)
    with torch.no_grad():
        served.model(pixel_values=batch)
        pool = served.tuner.pool
        expected = pool.weigh(pool.mapped(served.tuner.query(batch)))[0]
    torch.testing.assert_close(served.tuner.head.last_weights, expected)
    assert not served.tuner.head.last_weights.requires_grad


def test_the_expert_of_an_answer():
    served = session("dualprompt")
    answer = served.classify(pictures("a", 1)[0])
    (choice,) = answer.choices
    assert answer.expert == ("first", "second")[choice.rows[0]] and choice.layers == (1, 2)


def test_several_threads_see_whole_states():
    served = session()
    image, wrong = pictures("e", 1)[0], []

    def ask() -> None:
        for _ in range(15):
            names = served.classify(image).prediction.names
            if names[0] not in served._loaded_classes + ("e",) or len(names) not in (4, 5):
                wrong.append(names)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        served.teach("e", pictures("e"))
        served.undo()
    for thread in threads:
        thread.join()
    assert not wrong and served.classes == (*"abcd",)


def test_a_fitted_temperature_goes_with_the_classes_and_comes_back():
    served = session()
    served.config.temperature = 2.5
    served.teach("e", pictures("e"))
    assert served.config.temperature == 1.0
    served.undo()
    assert served.config.temperature == 2.5


# ------------------------------------------------------------------------------------------------- add_classes


def test_classes_that_cannot_be_added():
    model = session().model
    for names, expected in (
        (["a"], "knows already"),
        ([], "class_names is empty"),
        ("ef", "is the string"),
        (["e", "e"], "repeats"),
        ([3], "names are strings"),
    ):
        with pytest.raises(ValueError, match=expected):
            model.add_classes(names)
    with pytest.raises(ValueError, match="Call begin_task"):
        prompted("linear-probe", tasks=0, head="lda").add_classes(["e"])
    narrow = prompted("linear-probe", head="ridge", head_options={"projection": 6})
    before = narrow.peft_config["default"].classes
    with pytest.raises(ValueError, match="projection is 6"):
        narrow.add_classes(["e"])
    assert narrow.peft_config["default"].classes == before


def test_a_task_begins_after_classes_were_added():
    model = session("coda").model
    model.add_classes(["e"])
    model.begin_task(["f"])
    assert model.peft_config["default"].tasks == [[0, 1], [2, 3, 4], [5]]
    assert model.base_model.pool.rows_in_use == 3 * config("coda").components_per_task


# ------------------------------------------------------------------------------------------------- few images


def test_teaching_tells_the_head_that_images_are_few(tmp_path):
    served = session("l2p", "fusion")
    served.teach("e", pictures("e"))
    assert served.config.head_options["query_options"] == {"few_images": True}
    assert served.tuner.head.active.query.few_images
    again = Session(load(served.save(tmp_path / "taught"), is_trainable=True), processor())
    assert again.tuner.head.active.query.few_images
    served.undo()
    assert "query_options" not in served.config.head_options and not served.tuner.head.active.query.few_images
