"""What a run shares: its card, and its adapter on the Hub."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from ..hub.card import write_model_card
from ..hub.pushing import push_adapter
from ..metrics import RunResults
from ..metrics.results import FILE_NAME
from .extras import spared
from .measuring import MeasuringTrainer


class SharingTrainer(MeasuringTrainer):
    """Writes the card, and pushes as `push_adapter` does."""

    #: Finished tasks when the pictures in the folder were drawn; None: they are of another run, or there are none.
    drawn_tasks: int | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card with the measured results, which `push_to_hub` shares with the adapter."""
        if self.is_world_process_zero():
            with spared(f"No model card of {self.folder}"):
                record = self.folder / FILE_NAME
                write_model_card(
                    self.folder,
                    RunResults.load(record) if record.is_file() else self.results,
                    limits=self.strategy.limits,
                    adapter_id=self.hub_model_id,
                    **({} if self.drawn_tasks == self.finished_tasks else {"has_picture": False}),
                )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the adapter as it is now, and push it to `args.hub_model_id`, with card, record and pictures.

        One commit holds all, or there is none; no path of this machine and nothing else of the folder is shared (see
        `peft_cl.hub.push_adapter`).

        Args:
            commit_message: the commit's message.
            blocking: False: push in the background and return a `Future`.
            token: a token with the right to write; None: that of the arguments, or of `hf auth login`.
            revision: the branch, made if missing; None: that of the arguments, or `main`.
            private: whether a repository that is made is private; None: as the arguments say.
            **kwargs: `base_model`, `pull_request` and `sums` of `push_adapter`; others are left to the Trainer's card,
                which this one has no use for.

        Returns:
            What `push_adapter` returns, or a `Future` of it; None on other processes than the first.

        Raises:
            ValueError: no task is finished, or the folder is not fit to be shared.
            HubError: the Hub, or the way to it, refused something; an `OSError`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.tasks_before + self.finished_tasks:
            raise ValueError("No task is finished, so there is no adapter to push. Call train() first.")
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_adapter()
        if not self.is_world_process_zero():
            return None
        if self.args.pictures and self.drawn_tasks != self.finished_tasks:
            self.draw()
        self.create_model_card()
        options = {
            "message": commit_message,
            "revision": revision if revision is not None else self.args.hub_revision,
            "private": bool(self.args.hub_private_repo if private is None else private),
            "token": token,
            **{name: kwargs[name] for name in ("base_model", "pull_request", "sums") if name in kwargs},
        }
        self._finish_current_push()
        folder, name = Path(self.folder), self.hub_model_id
        if blocking:
            return push_adapter(folder, name, **options)
        return HfApi().run_as_future(push_adapter, folder, name, **options)
