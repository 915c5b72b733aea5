"""`peft-cl serve`: a page on which an adapter answers, is taught classes, and is saved."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import socket
import threading

from ..text import counted
from .errors import CommandError, explained
from .evaluate import add_model_options
from .output import complain, say


#: Ports that are tried where none is given.
FIRST_PORT, PORTS = 7860, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its name on the Hub")
    parser.add_argument("--output", metavar="FOLDER", help="new or empty folder that the page may save to")
    parser.add_argument("--read-only", action="store_true", help="answer alone: nothing can be taught or saved")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument(
        "--port", type=int, help=f"port to listen at (default: the first free one from {FIRST_PORT} on)"
    )
    parser.add_argument("--share", action="store_true", help="make a public address too, by gradio's servers")
    add_model_options(parser, batch_size=False)
    parser.epilog = (
        "All who can open the page use one adapter, and unless --read-only is given they can teach it. Nothing is "
        "written but to --output. Ctrl-C ends the server."
    )


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    free_port(arguments.host, arguments.port)  # refused before the adapter is loaded
    from ..serving import load_session, make_page
    from ..serving.saving import check_output

    if arguments.output:
        with explained("--output"):
            check_output(arguments.output)
    session = load_session(
        arguments.adapter,
        model=arguments.model,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        read_only=arguments.read_only,
    )
    page = make_page(session, read_only=arguments.read_only, output=arguments.output)
    with explained("The page cannot be served"):
        page.launch(
            server_name=arguments.host,
            server_port=free_port(arguments.host, arguments.port),
            share=arguments.share,
            prevent_thread_lock=True,
            quiet=True,
        )
    classes = counted(len(session.classes), "class")
    say(f"{session.name}, {classes}: {page.share_url or page.local_url}  (Ctrl-C ends it)", flush=True)
    if arguments.share and not page.share_url:
        complain("gradio's servers gave no public address: the page is at the local one.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        if not session.is_saved:
            complain("what was taught since it was last saved is gone.")
    finally:
        page.close(verbose=False)


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise CommandError('peft-cl serve needs gradio, which is not installed: pip install "peft-cl[serve]".')
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise CommandError(f"--port is {arguments.port}, but must be from 1 to 65535.")
    if arguments.read_only and arguments.output:
        raise CommandError("--output is given, but with --read-only nothing is saved. Leave one of them out.")


def free_port(host: str, port: int | None) -> int:
    """The port, or the first free one, tried before the adapter is loaded: gradio looks for one for minutes.

    Raises:
        CommandError: The host is no address of this machine, or the port is taken.
    """
    for number in [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            family, *_, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            with socket.create_server(address[:2], family=family):
                return number
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise CommandError(
                    f"--host is {host!r}, where nothing can be served at port {number}: {error.strerror}. Give "
                    "127.0.0.1 for this machine alone, 0.0.0.0 for all its addresses, or another --port."
                ) from error
    taken = f"--port is {port}, which is taken" if port else f"The ports from {FIRST_PORT} to {number} are taken"
    raise CommandError(f"{taken}. Give another by --port.")
