"""`peft-cl push`: put a saved adapter on the Hub, its page and the metrics as Spaces."""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import CommitInfo

from ..disk import local_path
from ..hub.pushing import check_name, push_adapter
from ..hub.shared_files import adapter_in
from ..hub.sources import find_source
from ..hub.spaces import METRICS_NAME, push_demo, push_metrics
from .adapters import SavedAdapter
from .errors import CommandError, explained
from .evaluate import add_trust_option, load_adapter
from .output import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a run, or of a saved adapter")
    parser.add_argument("repo", metavar="REPO", nargs="?", help="name on the Hub: user/name; made if there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if there is none (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request in place of a commit")
    parser.add_argument(
        "--no-sums",
        action="store_true",
        help="leave out the sums of the head: predicting does not need them, learning on does",
    )
    parser.add_argument(
        "--token", metavar="TOKEN", help="token with the right to write (default: that of hf auth login, or HF_TOKEN)"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="base model that the adapter is tried on; its name on the Hub, where the adapter names a folder here",
    )
    add_trust_option(parser)
    parser.add_argument("--space", metavar="OWNER/NAME", help="also push a Space with the page of the adapter")
    parser.add_argument(
        "--metrics",
        metavar="OWNER",
        help=f"in place of an adapter, push the metrics as a Space: evaluate.load('OWNER/{METRICS_NAME}')",
    )
    parser.epilog = (
        "Pushed are weights, sums of the head, image processor, card, record and pictures, in one commit. Nothing "
        "else of the folder leaves this machine, and no path on it does. The adapter is loaded first; what is damaged "
        "is not pushed."
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.metrics is not None:
        _refuse_with_metrics(arguments)
        with explained("The metrics are not pushed"):
            commit = push_metrics(arguments.metrics, private=arguments.private, token=arguments.token)
        say(f"{commit.commit_url}\nLoad them: evaluate.load('{arguments.metrics}/{METRICS_NAME}')")
        return
    if arguments.run is None or arguments.repo is None:
        raise CommandError("Give the folder of a run and a name on the Hub: peft-cl push RUN user/name.")
    with explained("The adapter is not pushed"):  # a fault that is seen at once, before anything is loaded
        check_name(arguments.repo, "REPO")
        if arguments.space is not None:
            check_name(arguments.space, "--space")
        folder = adapter_in(local_path(arguments.run))
    base_model = try_loading(folder, arguments.model, arguments.trust_remote_code)
    with explained("The adapter is not pushed"):
        commit = push_adapter(
            arguments.run,
            arguments.repo,
            base_model=base_model,
            private=arguments.private,
            revision=arguments.revision,
            message=arguments.message,
            pull_request=arguments.pull_request,
            token=arguments.token,
            sums=not arguments.no_sums,
        )
    say(described(arguments.repo, commit, arguments.pull_request), flush=True)
    if arguments.space is not None:
        with explained("The adapter is pushed, its Space is not"):
            commit = push_demo(arguments.repo, arguments.space, private=arguments.private, token=arguments.token)
        secret = " As the adapter is private, give the Space a secret HF_TOKEN." if arguments.private else ""
        say(f"Space: {commit.commit_url}{secret}")


def _refuse_with_metrics(arguments: argparse.Namespace) -> None:
    """The Space of the metrics takes neither an adapter nor what belongs to one."""
    given = ("run", "revision", "message", "pull_request", "no_sums", "model", "trust_remote_code", "space")
    more = [name for name in given if getattr(arguments, name)]
    if more:
        option = arguments.run if more[0] == "run" else f"--{more[0].replace('_', '-')}"
        raise CommandError(f"--metrics pushes no adapter, so {option} has no place. Leave it out, or push twice.")


def try_loading(folder: Path, model: str | None, trust_remote_code: bool) -> str | None:
    """Load the adapter as others will; return the name that its backbone has on the Hub, where the adapter has none.

    Raises:
        CommandError: It cannot be loaded.
    """
    adapter = SavedAdapter.read(str(folder))
    load_adapter(adapter, model, adapter.dtype, trust_remote_code)
    own = adapter.base_model
    if model is None or find_source(model).is_local:
        return None
    return model if not own or find_source(own).is_local else None


def described(repo: str, commit: CommitInfo, pull_request: bool) -> str:
    """Where it is now, and how it is loaded."""
    if pull_request and commit.pr_url:
        return f"Pull request: {commit.pr_url}"
    if pull_request:
        return f"Nothing has changed, so there is no pull request: {commit.commit_url}"
    return (
        f'Pushed: {commit.commit_url}\nLoad it, after import peft_cl: pipeline("image-classification", model="{repo}")'
    )
