"""Nothing outside a run folder is touched: not through links, nor by names that are paths; pipes are not read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from tuner_cases import config, prompted, tiny

from peft_cl import LinearProbeConfig, RunResults
from peft_cl.cli import main
from peft_cl.disk import replacing
from peft_cl.trainer.files import finish_writing, remove
from peft_cl.trainer.snapshot import STATE_FOLDER, forget_folder, seal_checkpoint, whole_checkpoint


PICTURES = ("accuracy_matrix.png", "curves.png", "prompt_usage.png", "key_similarity.png")


@pytest.fixture
def victim(tmp_path):
    """A folder outside with a file and a folder; it must be the same afterwards."""
    folder = tmp_path / "victim"
    (folder / "checkpoint-9").mkdir(parents=True)
    for name in ("precious", "checkpoint-9/files.json"):
        (folder / name).write_text("precious")
    yield folder
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert found == {"checkpoint-9", "checkpoint-9/files.json", "precious"}
    assert all((folder / name).read_text() == "precious" for name in ("precious", "checkpoint-9/files.json"))


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


LINKS = {
    "the files that wait": (".saved", ""),
    "the folder to write in": (".saving", ""),
    "the state": (STATE_FOLDER, ""),
    "a task's checkpoints": (f"{STATE_FOLDER}/task_1", ""),
    "a checkpoint": (f"{STATE_FOLDER}/task_0/checkpoint-3", "checkpoint-9"),
    "the snapshot": (f"{STATE_FOLDER}/sequence.pt", "precious"),
    "the backbone": ("backbone", ""),
    "a file of the backbone": ("backbone/model.safetensors", "precious"),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("way", ["train", "resume", "from elsewhere"])
def test_a_link_in_a_run_is_refused(kind, way, make_trainer, victim, tmp_path):
    name, target = LINKS[kind]
    folder = tmp_path / ("run" if way != "from elsewhere" else "other")
    link(folder / name, victim / target)
    with pytest.raises(ValueError, match="is a symbolic link to .*Remove it, or give another output_dir"):
        trainer = make_trainer(LinearProbeConfig(), num_train_epochs=1)
        trainer.train(resume_from_checkpoint=None if way == "train" else True if way == "resume" else str(folder))
    assert (folder / name).is_symlink()


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("word", ["--overwrite", "--resume"])
def test_the_command_refuses_a_link(kind, word, train, victim, tmp_path, capsys):
    name, target = LINKS[kind]
    link(tmp_path / "out" / name, victim / target)
    assert train(word) == 2
    assert "is a symbolic link" in capsys.readouterr().err


def test_waiting_files_do_not_go_through_a_link(victim, tmp_path):
    for name in ("first", "sub/second"):
        (tmp_path / "run" / ".saved" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / ".saved" / name).write_text("new")
    link(tmp_path / "run" / "sub", victim)
    with pytest.raises(ValueError, match="is a symbolic link"):
        finish_writing(tmp_path / "run")
    assert not (tmp_path / "run" / "first").exists()  # all or nothing
    (tmp_path / "run" / "sub").unlink()
    finish_writing(tmp_path / "run")
    assert (tmp_path / "run" / "sub" / "second").read_text() == "new" and not (tmp_path / "run" / ".saved").exists()


def test_removing_a_link_leaves_what_is_behind_it(victim, tmp_path):
    for removes in (remove, forget_folder):
        link(tmp_path / "link", victim)
        removes(tmp_path / "link")
        assert not (tmp_path / "link").is_symlink()


def test_a_run_folder_may_itself_be_behind_a_link(make_trainer, tmp_path):
    (tmp_path / "disk").mkdir()
    link(tmp_path / "run", tmp_path / "disk")
    make_trainer(LinearProbeConfig(), num_tasks=2, num_train_epochs=1).train()
    assert RunResults.load(tmp_path / "disk").finished_tasks == 2


@pytest.mark.parametrize("special", ["link", "pipe", "hard link"])
def test_single_files_are_replaced_and_not_written_into(special, trained, victim, tmp_path):
    """Pictures, card and record: all that is written anew into a folder that others filled."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    names = (*PICTURES[:2], "README.md", "results.json")
    results = RunResults.load(run)
    for name in names:
        (run / name).unlink(missing_ok=True)
        if special == "pipe":
            os.mkfifo(run / name)
        elif special == "link":
            link(run / name, victim / "precious")
        else:
            os.link(victim / "precious", run / name)
    from peft_cl.hub import write_model_card
    from peft_cl.plots.run import write_pictures

    results.save(run)
    write_model_card(run, results)
    write_pictures(run, results)
    assert all((run / name).is_file() and not (run / name).is_symlink() for name in names)
    assert RunResults.load(run) == results


def test_a_failed_write_leaves_the_file_and_nothing_beside_it(tmp_path):
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file.txt") as aside:
        aside.write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"] and (tmp_path / "file.txt").read_text() == "old"


@pytest.mark.parametrize("name", ["/abs/olute", "a/b", "..", "a.b", "", "a\\b", "../up", "nul\0"])
def test_an_adapters_name_is_no_path(name, tmp_path):
    with pytest.raises(ValueError, match="must be a text without"):
        get_peft_model(tiny(), config("l2p"), adapter_name=name)
    model = prompted("l2p")
    with pytest.raises(ValueError, match="must be a text without"):
        model.add_adapter(name, config("l2p"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a text without"):
        PeftModel.from_pretrained(tiny(), tmp_path, adapter_name=name)
    with pytest.raises(ValueError, match="must be a text without"):
        tiny().load_adapter(str(tmp_path), name)


@pytest.mark.parametrize("name", ["_state", "backbone", "runs"])
def test_an_adapter_does_not_have_the_name_of_a_runs_folder(name, make_trainer, tiny_vit, victim, tmp_path):
    model = get_peft_model(tiny_vit(), LinearProbeConfig(), adapter_name=name)
    with pytest.raises(ValueError, match=f"named '{name}'.*Give it another name"):
        make_trainer(None, model=model)
    link(tmp_path / "run" / "mine", victim)
    with pytest.raises(ValueError, match="is a symbolic link"):
        make_trainer(None, model=get_peft_model(tiny_vit(), LinearProbeConfig(), adapter_name="mine"))


# ----------------------------------------------------------------------------------------------- special files


@pytest.mark.parametrize("what", ["pipe", "device", "link to a device"])
@pytest.mark.parametrize("name", ["results.json", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("word", ["info", "evaluate", "plot"])
@pytest.mark.timeout(60)
def test_special_files_are_not_read(word, name, what, trained, place, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / name).unlink()
    if what == "pipe":
        os.mkfifo(run / name)
    else:
        link(run / name, Path("/dev/zero"))
    data = ["--dataset", str(place / "data")] if word == "evaluate" else []
    if word == "plot" and name == "adapter_config.json":
        return  # the names of the layers are the only thing that it takes from there
    status = main([word, str(run), *data])
    error = capsys.readouterr().err
    assert status == 2 or (word, name) == ("plot", "adapter_model.safetensors")
    assert status == 0 or name in error


def test_a_pipe_in_place_of_weights_is_named_by_the_library_too(tmp_path):
    prompted("l2p").save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no regular file"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_a_pipe_in_place_of_a_checkpoints_list_is_not_read(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"1")
    seal_checkpoint(checkpoint)
    assert whole_checkpoint(tmp_path) == checkpoint
    for junk in ("[]", '{"a": 1}', '{"/dev/zero": "x"}', json.dumps({"../victim": "x"})):
        (checkpoint / "files.json").write_text(junk)
        with pytest.warns(UserWarning, match="damaged|not written to its end"):
            assert whole_checkpoint(tmp_path) is None
        checkpoint.mkdir()
        (checkpoint / "weights").write_bytes(b"1")
    os.mkfifo(checkpoint / "files.json")
    with pytest.warns(UserWarning, match="not written to its end"):
        assert whole_checkpoint(tmp_path) is None


def test_files_are_for_whom_the_umask_says(tmp_path):
    path = tmp_path / "x.json"
    with replacing(path) as aside:
        aside.write_text("{}")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
