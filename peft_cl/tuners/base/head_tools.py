"""What can be done with the head of an adapter without the trainer: observe, fit, go on, forget, join."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...heads import Head, LinearHead, Sizes
from ...heads.files import SUMS_FILE, load_sums, save_sums
from ...text import brief
from .config import PromptPoolConfig
from .digests import digest_in_bfloat16, digest_of_tensors
from .encoder import evaluation_mode
from .merged import merged
from .saved import file_beside
from .shares import POOL_FACTS, new_config, share_of


class HeadTools:
    """Methods of `PromptPoolModel` around heads that observe, such as `"lda"` and `"ridge"`."""

    @torch.no_grad()
    def features(
        self, pixel_values: torch.Tensor, query: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the active adapter's head reads of images, in evaluation mode.

        Args:
            pixel_values: (B, channels, height, width).
            query: (B, Q), the frozen model's features, where they are known.

        Returns:
            Features (B, F), and the query (B, Q) (None where there is no use for one).
        """
        with evaluation_mode(self.model), self.head.capturing() as captured:
            self.model(pixel_values=pixel_values, query=query)
        return captured[0], captured[1]

    def observe(self, pixel_values: torch.Tensor, labels: torch.Tensor, query: torch.Tensor | None = None) -> None:
        """Show training images of the current task to a head that observes, each once; then call `fit_head`.

        Args:
            pixel_values: (B, channels, height, width), without augmentation.
            labels: (B,), rows of the classes, as `model.config.label2id` has them.
            query: as `features` has it.
        """
        self.need_sums()
        features, query = self.features(pixel_values, query)
        self.head.active.observe(features, torch.as_tensor(labels), query)

    def fit_head(self, batches: Iterable[Mapping[str, Any]] = ()) -> None:
        """Compute the head from all that it has observed, and from `batches` before that.

        Args:
            batches: of the current task's training images, with `pixel_values` and `labels`: a `DataLoader`, for
                instance.

        Raises:
            ValueError: the adapter was loaded and its sums were not, or labels of no class.

        Example:
            >>> model = get_peft_model(base, LinearProbeConfig(head="lda"))    # doctest: +SKIP
            >>> model.begin_task(["cat", "dog"])                               # doctest: +SKIP
            >>> model.fit_head(loader)                                         # doctest: +SKIP
        """
        device = self.model.device
        for batch in batches:
            self.observe(batch["pixel_values"].to(device), batch["labels"], batch.get("query"))
        self.need_sums()
        self.head.active.fit()

    # ----------------------------------------------------------------------------------------------- going on

    def save_sums(self, folder: str | Path) -> Path | None:
        """Write the sums of the active adapter's head into `folder`, beside its adapter; None if it has none.

        Predicting does not need them: they are wanted to learn on (`begin_task`), to `join` and to `forget_classes`.
        """
        head = self.head.active
        return save_sums(folder, head.going_on(), self._facts_of_sums()) if head.observes and head.has_sums else None

    def load_sums(self, folder: str | Path) -> None:
        """Take up the sums that `save_sums` wrote.

        Raises:
            FileNotFoundError: there are none in `folder`.
            ValueError: the file is damaged, or of another adapter or backbone.
        """
        path = Path(folder) / SUMS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {SUMS_FILE} in {str(folder)!r}. Give the folder that the trainer or "
                "model.save_sums(folder) wrote it to."
            )
        self.head.active.go_on(load_sums(path, self._facts_of_sums()))

    def find_sums(self, adapter_name: str) -> bool:
        """Have the sums of an adapter's head, where they are in memory or beside its file; False: there are none."""
        head = self.head.entries[adapter_name]
        file = None if head.has_sums else file_beside(self.peft_config[adapter_name].source, SUMS_FILE)
        if file is not None:
            head.go_on(load_sums(file, self._facts_of_sums(adapter_name)))
        return head.has_sums

    def need_sums(self, adapter_name: str | None = None) -> None:
        """Have the sums of an adapter's head, by default the active one's: an adapter that was loaded finds them where
        its file lies.

        Raises:
            ValueError: they are not there.
        """
        if adapter_name is None and self.head.active is None:
            return
        name = adapter_name or self._active_config()[0]
        config = self.peft_config[name]
        if not self.find_sums(name):
            where = f" beside it in {config.source[0]!r}" if config.source else ""
            raise ValueError(
                f"The head {config.head!r} of this adapter is computed from sums over all training images, and to "
                f"learn on it needs them, but there is no {SUMS_FILE}{where}. Copy that file there from where the "
                "adapter was trained (the trainer writes it; with a loop of your own, model.save_sums(folder)), or "
                "call model.load_sums(folder)."
            )

    def _facts_of_sums(self, adapter_name: str | None = None) -> dict[str, Any]:
        """What sums belong to."""
        name = adapter_name or self._active_config()[0]
        config, head = self.peft_config[name], self.head.entries[name]
        saved = ((name, value) for name, value in head.state_dict().items() if not name.startswith("training_head"))
        return {
            "head": config.head,
            "features": [config.head_features, config.head_layers],
            "classes": config.classes,
            "backbone": self.backbone_digest(),
            "adapter": digest_of_tensors(saved)[:16],
        }

    def backbone_digest(self) -> str:
        """A digest of the backbone's weights, the same in float32 and in bfloat16."""
        return digest_in_bfloat16(merged(self.encoder.base_layer))

    # ----------------------------------------------------------------------------------------------- the trained head

    def _set_training_head(self, head: Head, config: PromptPoolConfig, known: int, *, backbone_learns: bool) -> None:
        """Under a head that is computed a linear one is trained, as long as prompts or the backbone learn.

        Args:
            head: the head, which has its rows.
            config: its adapter's.
            known: how many of its classes, the first ones, were there before.
            backbone_learns: whether weights of the backbone are trained.
        """
        learning = backbone_learns or any(True for _ in self.pool.parameters())
        learns = learning and not config.prompts_frozen
        is_trained = any(name for name, _ in head.named_parameters() if not name.startswith("training_head"))
        if not head.observes or head.guides_prompts or is_trained or not learns:
            head.training_head = None
        elif head.training_head is None:
            # From a stream it sees, in the same step, what the other head observes: the CLS token stands in front.
            shared = config.stream and config.features
            width = self._geometry().hidden_size if shared else self._width_of_paper(self.pool)
            linear = LinearHead(Sizes(width, 0), head.classes, config.head_init)
            head.training_head = linear.to(self.head_device).train(head.training)
        else:
            head.training_head.grow(head.classes, keep=known)

    # ----------------------------------------------------------------------------------------------- classes

    def add_classes(self, class_names: Sequence[str]) -> None:
        """Add classes to the active adapter without a new task: they belong to the task begun last, and no prompt
        changes. Then call `fit_head` with some images of them.

        `begin_task` gives CODA-Prompt, DualPrompt and a masked L2P new rows, which take part in every prediction from
        then on. Nobody trains them where a class is only to be shown to the head, so here there are none. An LDA is
        told that some classes have fewer images than others (its option `few_images`).

        Args:
            class_names: names of the classes, new ones.

        Raises:
            ValueError: a head whose rows are trained, names that are known or none, an adapter without a task or
                without the sums of its head, or one that was loaded for inference.

        Example:
            >>> model = PeftModel.from_pretrained(base, "out", is_trainable=True)    # doctest: +SKIP
            >>> model.add_classes(["okapi"])                                         # doctest: +SKIP
            >>> label = model.config.label2id["okapi"]                               # doctest: +SKIP
            >>> model.fit_head([{"pixel_values": pixels, "labels": [label] * len(pixels)}])    # doctest: +SKIP
        """
        adapter, config = self._learning_config()
        head = self.head.entries[adapter]
        if head.needs_training:
            raise ValueError(
                f"The {head.title} head of this adapter learns a class by training alone. Begin a task with the class "
                "(begin_task) and train it, or take a head that is computed from images: 'ncm', 'lda', 'ridge', "
                "'aligned', or a 'fusion' of these."
            )
        self.need_sums()
        head.check_classes(len(config.classes or ()) + len(class_names))
        known = config.add_classes(class_names)
        config.head_options = dict(head.expect_few(config.head_options))
        config.forget_temperature()
        self._grow_head(head, known)
        self.head.show_labels()

    def forget_classes(self, class_names: Sequence[str]) -> None:
        """Take classes out of the active adapter: its head then is that of a model that never saw them.

        Rows of later classes move up. A task of which no class is left goes too, with the rows that it brought into
        the pool. Sums over pairs of features hold all classes together unless
        `head_options={"by_class": True}` keeps them apart, so only then can `lda` and `ridge` forget; nearest class
        means can in any case, and the rows of a trained head are taken out.

        Args:
            class_names: names of classes learnt.

        Raises:
            ValueError: unknown names, all classes, or sums in which the classes are not apart.

        Warns:
            UserWarning: prompts were learnt with images of these classes, and are as they were.
        """
        adapter, config = self._learning_config()
        names = [class_names] if isinstance(class_names, str) else list(class_names)
        unknown = [name for name in names if name not in config.classes]
        if unknown or not config.tasks:
            raise ValueError(
                f"{brief(unknown or names)} are no classes that this adapter has learnt. Name some of "
                f"{brief(config.classes)}."
            )
        kept = [row for row, name in enumerate(config.classes) if name not in names]
        if not kept:
            raise ValueError("All classes would be forgotten. Make a new adapter instead.")
        self.need_sums()
        head = self.head.entries[adapter]
        head.keep_rows(kept)
        if head.training_head is not None:
            head.training_head.keep_rows(kept)
        config.forget_temperature()
        place = {row: index for index, row in enumerate(kept)}
        left = [task for task, rows in enumerate(config.tasks) if place.keys() & set(rows)]
        if len(left) < config.num_tasks:
            self._forget_tasks(adapter, left)
        config.classes = [config.classes[row] for row in kept]
        config.tasks = [[place[row] for row in config.tasks[task] if row in place] for task in left]
        config.rows_in_use = self.pool.rows_in_use
        self.head.forget_rows()
        self.head.show_labels()
        if any(True for _ in self.pool.parameters()) or head.evidence is not None:
            warnings.warn(
                f"{', '.join(names)}: their rows and sums are gone, but prompts, keys and task evidence may have been "
                "learnt with their images and are as they were. Only an adapter without prompts forgets altogether.",
                stacklevel=2,
            )

    def _forget_tasks(self, adapter: str, left: Sequence[int]) -> None:
        """Take what other tasks than those `left` brought out of an adapter's pool and evidence."""
        config, pool, head = self.peft_config[adapter], self.encoder.entries[adapter], self.head.entries[adapter]
        share = share_of(config, pool, head, left)
        facts = new_config([share], getattr(config, "joined_prompts", "apart"))
        smaller = type(pool)(facts, facts.geometry)
        smaller.take([share])
        learns = {name: value.requires_grad for name, value in pool.named_parameters()}
        for name, value in smaller.named_parameters():
            value.requires_grad_(learns[name])
        for name in POOL_FACTS:
            if hasattr(config, name):
                setattr(config, name, getattr(facts, name))
        smaller.config = config
        self.encoder.add_entry(adapter, smaller)
        if head.evidence is not None:
            head.evidence.take([(head.evidence, left)])
