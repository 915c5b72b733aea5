"""Adapters pushed to the Hub: all of it in one commit, or nothing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..disk import local_path
from ..text import brief, counted
from .faults import hub_faults
from .shared_files import OWN_FILES, Files, files_to_share


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    pull_request: bool = False,
    token: str | None = None,
    sums: bool = True,
) -> CommitInfo:
    """Push an adapter to the Hub: its weights, the sums of its head, image processor, card, record and pictures.

    Everything is read and checked first; then there is one commit, so the repository never holds half of it. Record,
    card and configuration are shared without paths of this machine, and of a run's folder nothing else is shared: no
    checkpoints, no state to go on from, no logs. A card that is there is kept, and its usage example gets the
    adapter's name. Pushing again replaces the files, and removes pictures and sums that are no longer there.

    Args:
        folder: The folder of a run, or one that `save_pretrained` wrote.
        repo_id: The name on the Hub, `"user/name"`. The repository is made if there is none.
        base_model: Name of the adapter's backbone on the Hub, where the adapter names a folder of this machine.
        private: Make the repository private. One that is there and public is refused.
        revision: The branch to push to, made from `main` if there is none. `None`: `main`.
        message: The commit's message. `None`: it names the method and the number of tasks.
        pull_request: Open a pull request in place of a commit to `main`.
        token: A token with the right to write. `None`: that of `hf auth login`, or `HF_TOKEN`.
        sums: Whether the sums of the head are pushed (`head_sums.safetensors`): they are wanted to learn on, to join
            adapters and to forget classes, not to predict.

    Returns:
        `huggingface_hub.CommitInfo`: `commit_url`, `oid`, and `pr_url` of a pull request.

    Raises:
        ValueError: The folder holds no adapter, a file is damaged, the card's metadata is not valid, or arguments do
            not fit together. Nothing was sent.
        HubError: The Hub, or the way to it, refused something; an `OSError`. The repository is as it was.

    Example:
        ```python
        >>> push_adapter("out", "user/coda-birds", private=True).commit_url
        'https://huggingface.co/user/coda-birds/commit/3f2a...'
        ```
    """
    check_name(repo_id)
    if base_model is not None:
        check_name(base_model, "base_model")
    if pull_request and revision is not None:
        raise ValueError(
            f"revision is {brief(revision)}, but a pull request has a branch of its own. Leave out revision= or "
            "pull_request=."
        )
    files, config = files_to_share(local_path(folder), repo_id, base_model, sums)
    default = f"Upload {config.title} after {counted(config.num_tasks, 'task')}"
    return commit_files(
        repo_id,
        files,
        message or default,
        outdated=OWN_FILES,
        private=private,
        revision=revision,
        pull_request=pull_request,
        token=token,
    )


def check_name(name: str, argument: str = "repo_id") -> None:
    """Refuse what is no name on the Hub with its owner's.

    Raises:
        ValueError: it says what is wrong with it.
    """
    try:
        validate_repo_id(name)
        is_whole = name.count("/") == 1
    except (HFValidationError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{argument} is {brief(name)}, but must be a name on the Hub with its owner's, such as user/coda-birds: "
            "letters, digits, '-', '_' and '.', 96 at most."
        )


def commit_files(
    repo_id: str,
    files: Files,
    message: str,
    *,
    repo_type: str = "model",
    outdated: Collection[str] = (),
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """Put files into a repository of the Hub by one commit; the repository and the branch are made if missing.

    Args:
        repo_id: The repository.
        files: Path in it -> a file on this machine, or the content.
        message: The commit's message.
        repo_type: `"model"` or `"space"` (of gradio).
        outdated: Paths that are removed if they are there and no file takes their place.
        private, revision, pull_request, token: As `push_adapter` has them.

    Raises:
        ValueError: the repository is public, and `private` is asked for.
        HubError: the Hub refused something. There is no commit then.
    """
    api = HfApi(token=token)
    sdk = "gradio" if repo_type == "space" else None
    with hub_faults(f"{repo_id!r} cannot be pushed to", token):
        api.create_repo(repo_id, repo_type=repo_type, private=private or None, space_sdk=sdk, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ValueError(
                f"{repo_id!r} is there and public, but private=True was asked for, which holds for new repositories. "
                "Make it private in its settings on the Hub, or leave private=True out."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        before = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        there = {sibling.rfilename for sibling in before.siblings or ()}
        add = [CommitOperationAdd(path, content) for path, content in files.items()]
        remove = [CommitOperationDelete(path) for path in sorted(there & set(outdated) - set(files))]
        return api.create_commit(
            repo_id,
            [*remove, *add],
            commit_message=message,
            repo_type=repo_type,
            revision=revision,
            create_pr=pull_request,
            parent_commit=before.sha,  # so that nobody's commit in between is written over
        )
