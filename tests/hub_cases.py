"""Processes that are clients of the loopback Hub, for several test files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hub_server import LoopbackHub


PROCESS = Path(__file__).with_name("hub_session.py")
#: Odd enough to be found wherever it lies.
TOKEN = "hf_TokenOfTheEnvironment"


def environment(hub: LoopbackHub, home: Path, token: str | None = None) -> dict[str, str]:
    """That of a process which knows no other Hub, and nothing of the user's."""
    foreign = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")  # offline switches, caches and tokens of the user
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    kept |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    # Xet, the Hub's own way to store large files, is not imitated; without it the client takes git-LFS.
    kept |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return kept | ({"HF_TOKEN": token} if token else {})


@contextmanager
def hub_with_base(place: Path, *tokens: str) -> Iterator[LoopbackHub]:
    """A loopback Hub that has the fixture's base model as `user/base`, pushed with the first of the tokens."""
    with LoopbackHub(tokens=tokens) as hub:
        files = {path.name: path.read_bytes() for path in (place / "model").iterdir()}
        hub.add_commit("user/base", "initial commit", tokens[0], files)
        yield hub


class Session:
    """A process that does one thing after the other; see `hub_session.py`."""

    def __init__(self, hub: LoopbackHub, home: Path, token: str | None = TOKEN):
        self.home = home
        self._log = open(home.with_suffix(".log"), "w+")
        self._process = subprocess.Popen(
            [sys.executable, str(PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(hub, home, token),
            cwd=home.parent,
        )

    def __call__(self, do: str, *words: Any) -> dict[str, Any]:
        """What the function `do` of the process gives: `value`, `output`, `errors` and `fault`."""
        self._process.stdin.write(json.dumps({"do": do, "words": words}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise AssertionError(f"The process ended: {self._log.read()[-3000:]}")
        return json.loads(line)

    def command(self, *words: Any) -> dict[str, Any]:
        return self("command", *map(str, words))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()
