"""The page of `peft-cl serve`: the running server over HTTP, and in a real browser; what the command refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import pytest
from conftest import BROWSERS
from gradio_client import Client, handle_file
from peft import PeftModel
from serving_cases import pictures, processor, session
from tuner_cases import images as pixels_of
from tuner_cases import prompted, tiny

from peft_cl.cli import main
from peft_cl.serving import load_session, make_page, show


HOSTILE = '<img src=x onerror=alert(1)>${7*7}{{8*8}}"&amp;'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`model`, a backbone; adapters `letters`, which knows a to d, and `trained`, with a linear head; `photos`."""
    place = tmp_path_factory.mktemp("serving")
    tiny().save_pretrained(place / "model")
    processor().save_pretrained(place / "model")
    served = session("dualprompt", "ncm")
    served.config.base_model_name_or_path = str(place / "model")
    served.save(place / "letters")
    linear = prompted("l2p")
    linear.peft_config["default"].base_model_name_or_path = str(place / "model")
    linear.save_pretrained(place / "trained")
    (place / "photos").mkdir()
    for name in "abe":
        for number, picture in enumerate(pictures(name, 5, seed=2)):
            picture.resize((64, 64)).save(place / "photos" / f"{name}{number}.png")
    (place / "photos" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    return place


def photos(folder: Path, name: str) -> list[Path]:
    return sorted((folder / "photos").glob(f"{name}*.png"))


@contextmanager
def serving(*words: str | Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a server that runs as a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_cl.cli", "serve", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        # As in a terminal: tests that run in the background ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.stderr.read()
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(folder) -> Iterator[str]:
    with serving(folder / "letters", "--output", folder / "a folder" / "taught") as (address, _):
        yield address


def gallery(files: list[Path]) -> list[dict]:
    return [{"image": handle_file(str(file)), "caption": None} for file in files]


# ------------------------------------------------------------------------------------------------- over HTTP


def test_the_page_over_http(server, folder):
    """Teach, undo, forget and save, as the page does."""
    client = Client(server, verbose=False)

    def taken_for(file: Path) -> tuple[str, str]:
        label, details = client.predict(handle_file(str(file)), api_name="/classify")
        return (label or {}).get("label"), details

    name, details = taken_for(photos(folder, "a")[0])
    assert name == "a" and "task_0" in details and re.search(r"row \d of 2, layers 1, 2", details)
    status, classes, *_ = client.predict("e", gallery(photos(folder, "e")[:4]), api_name="/teach")
    assert re.search(r'class="done".*e is known now: 4 images, \d+\.\d s', status)
    assert "5 classes, 1 of them taught here" in classes
    name, details = taken_for(photos(folder, "e")[4])
    assert name == "e" and "taught here" in details
    assert taken_for(photos(folder, "a")[0])[0] == "a"
    status, *_ = client.predict(api_name="/save")
    assert "Saved in the folder taught." in status
    taught = folder / "a folder" / "taught"
    assert json.loads((taught / "adapter_config.json").read_text())["classes"] == [*"abcde"]
    assert PeftModel.from_pretrained(tiny(), str(taught)).eval()(pixel_values=pixels_of(2)).logits.shape == (2, 5)
    status, classes, *_ = client.predict(api_name="/undo")
    assert "is undone" in status and "4 classes" in classes
    assert taken_for(photos(folder, "e")[4])[0] != "e"
    status, classes, *_ = client.predict("a", api_name="/forget")
    assert "a is forgotten" in status and "3 classes" in classes
    status, classes, *_ = client.predict(api_name="/undo")
    assert "4 classes" in classes


def test_faults_are_said_on_the_page(server, folder):
    client = Client(server, verbose=False)
    good, bad = photos(folder, "e")[:1], [folder / "photos" / "bad.png"]
    for name, files, expected in (
        ("", good, "has no name"),
        ("x" * 101, good, "may have 100"),
        ("e", [], "no image of"),
        ("e", bad, "The image is damaged"),
        ("e", good * 51, "at most 50 are taken"),
    ):
        status, classes, *_ = client.predict(name, gallery(files), api_name="/teach")
        assert 'class="fault"' in status and expected in status and "4 classes" in classes
    label, details = client.predict(handle_file(str(bad[0])), api_name="/classify")
    assert not label and "The image is damaged" in details and str(folder) not in details
    assert "Choose one in the list" in client.predict(None, api_name="/forget")[0]


def test_what_a_visitor_writes_is_text(server, folder):
    client = Client(server, verbose=False)
    status, classes, *_ = client.predict(HOSTILE, gallery(photos(folder, "e")[:4]), api_name="/teach")
    client.predict(api_name="/undo")
    for html in (status, classes):
        assert "<img" not in html and "${" not in html and "{{" not in html and "&lt;img" in html


@pytest.mark.slow
def test_ctrl_c_ends_it_and_says_what_is_lost(folder):
    for words, lost in ((["--read-only"], []), ([], ["peft-cl: what was taught since it was last saved is gone."])):
        with serving(folder / "letters", *words) as (address, process):
            client = Client(address, verbose=False)
            if lost:
                client.predict("e", gallery(photos(folder, "e")[:2]), api_name="/teach")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert [line for line in process.stderr.read().splitlines() if line.startswith("peft-cl:")] == lost


# ------------------------------------------------------------------------------------------------- the page as made


def words_of(page) -> str:
    return json.dumps([block.get("props", {}) for block in page.get_config_file()["components"]], default=str)


def actions(page) -> set[str]:
    return {each["api_name"] for each in page.get_config_file()["dependencies"] if each["api_visibility"] != "private"}


def test_read_only_has_no_way_to_change_anything(folder):
    assert actions(make_page(str(folder / "letters"), read_only=True)) == {"classify"}
    assert actions(make_page(session())) == {"classify", "teach", "undo", "forget"}
    assert actions(make_page(session(), output=folder / "new")) == {"classify", "teach", "undo", "forget", "save"}
    served = load_session(str(folder / "letters"), read_only=True)
    with pytest.raises(ValueError, match="loaded for inference"):
        served.teach("e", pictures("e"))


def test_a_head_that_cannot_be_taught_says_so_in_place_of_the_buttons(folder):
    page = make_page(str(folder / "trained"))
    assert "takes nothing from images without training" in words_of(page) and '"Teach"' not in words_of(page)


def test_the_page_shows_no_path_and_fetches_nothing(folder):
    (folder / "letters" / "head_sums.safetensors").rename(folder / "sums")
    try:
        page = make_page(str(folder / "letters"))
    finally:
        (folder / "sums").rename(folder / "letters" / "head_sums.safetensors")
    assert "no head_sums.safetensors beside it in" in words_of(page) and str(folder) not in words_of(page)
    assert page.analytics_enabled is False
    assert "http" not in words_of(make_page(session(), output=folder / "new"))


def test_names_are_text_wherever_they_are_shown():
    served = session("l2p")
    served.config.classes[0] = HOSTILE
    served.task_names = (HOSTILE, "second")
    served.name = HOSTILE
    answer = served.classify(pictures("a", 1)[0])
    shown = (show.heading(served, False), show.classes(served), show.details(answer, served), show.fault(HOSTILE))
    assert all("<img" not in html and "${" not in html and "{{" not in html for html in shown)
    assert "\x1b" not in show.text("a\x1b[2Jb")


def test_output_is_looked_at_before_anything_is_loaded(folder):
    with pytest.raises(FileExistsError, match="Give the name of a new or empty folder"):
        make_page("nowhere", output=folder / "model")


# ------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "There is no adapter 'nowhere'"),
        (["LETTERS", "--port", "0"], "--port is 0, but must be from 1 to 65535"),
        (["LETTERS", "--read-only", "--output", "x"], "with --read-only nothing is saved"),
        (["LETTERS", "--output", "LETTERS"], "is there already, and nothing is written over"),
        (
            ["LETTERS", "--host", "no.such.host.invalid"],
            "--host is 'no.such.host.invalid', where nothing can be served",
        ),
    ],
)
def test_what_the_command_refuses(words, expected, folder, capsys):
    words = [str(folder / "letters") if word == "LETTERS" else word for word in words]
    assert main(["serve", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-cl: ")]
    assert expected in line


def test_a_port_that_is_taken(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(folder / "letters"), "--port", str(port)]) == 2
    assert f"--port is {port}, which is taken. Give another by --port." in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "anything"]) == 2
    assert 'pip install "peft-cl[serve]"' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(width, scheme, folder, tmp_path):
    """What a visitor does; no script of a name runs, and nothing is asked of any other machine."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(which, BROWSERS)))
    with serving(folder / "letters") as (address, _), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        outside, dialogs = [], []
        page.on("request", lambda each: outside.append(each.url) if is_outside(each.url, address) else None)
        page.on("dialog", lambda each: (dialogs.append(each.message), each.dismiss()))
        page.set_default_timeout(120_000)
        page.goto(address)
        page.set_input_files("#image input[type=file]", photos(folder, "e")[4])
        page.wait_for_selector("#details table")
        assert page.inner_text("#answer h2") in "abcd"
        page.fill("#name input, #name textarea", HOSTILE)
        page.set_input_files("#images input[type=file]", photos(folder, "e")[:4])
        page.wait_for_function("document.querySelectorAll('#images img').length >= 4")
        page.click("#teach")
        page.wait_for_selector("#status .done")
        assert f"{HOSTILE} is known now: 4 images" in page.inner_text("#status")
        page.wait_for_function("document.querySelector('#answer h2').innerText.includes('onerror')")
        assert page.inner_text("#answer h2") == HOSTILE and HOSTILE in page.inner_text("#classes")
        assert "taught here" in page.inner_text("#details")
        page.wait_for_function("document.querySelector('#name input, #name textarea').value === ''")
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0
        page.click("#undo")
        page.wait_for_function("document.querySelector('#status').innerText.includes('undone')")
        assert "4 classes" in page.inner_text("#classes")
        page.click("#teach")
        page.wait_for_selector("#status .fault")
        assert not page.query_selector("img[src=x]") and not dialogs and not outside
        browser.close()


def is_outside(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))
