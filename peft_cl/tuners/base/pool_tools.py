"""The part of a tuner that looks at a task's images before it is learnt, and lets its pool grow."""

from __future__ import annotations

import torch

from ...heads.checks import check_count


class PoolTools:
    """Base of `PromptPoolModel`, which has the adapters, the encoder and the pool."""

    def grow_pool(self, count: int) -> int:
        """Add rows to the pool of the active adapter, for a user who finds that it is full.

        Possible where all tasks share the rows: L2P, CODA-Prompt with `components_per_task=None`, DualPrompt with
        `expert_choice="key"`; the others add rows with each task. Call it between tasks: parameters are replaced, so
        make a new optimizer (the trainer does, for each task).

        Args:
            count: number of rows, at least 1; no more are added than `max_pool_size` leaves room for.

        Returns:
            How many were added.

        Raises:
            ValueError: `count` is no such number, each task has rows of its own, the pool is full (`max_pool_size`)
                or frozen, or the adapter was loaded for inference.

        Example:
            >>> model = get_peft_model(base, L2PConfig(pool_size=10))    # doctest: +SKIP
            >>> model.base_model.grow_pool(5)                            # doctest: +SKIP
            5
        """
        check_count("count", count)
        config, pool = self._learning_config()[1], self.pool
        if not getattr(config, "shares_rows", False):
            raise ValueError(
                f"grow_pool was called, but in this {config.method} adapter no rows are shared by the tasks: each "
                "brings its own. Leave the call out"
                + (f", or set {config.size_option}." if hasattr(config, "size_option") else ".")
            )
        if pool.is_frozen:
            raise ValueError(
                "grow_pool was called, but the prompts are frozen after the first task (train_prompts='first_task'): "
                "new rows would never learn. Leave the call out, or set train_prompts='every_task'."
            )
        if config.growth_allowed(count) == 0:
            raise ValueError(
                f"grow_pool was called, but the pool has {config.total_rows} rows, and max_pool_size is "
                f"{config.max_pool_size}. Raise it, or leave the call out."
            )
        added = pool.grow(count)
        config.rows_in_use = pool.rows_in_use
        return added

    @property
    def wants_images(self) -> bool:
        """Whether the task that has begun should be shown some of its images (`look_at`)."""
        config, pool = self._active_config()[1], self.pool
        return getattr(config, "wants_images", False) and not pool.is_frozen

    @torch.no_grad()
    def look_at(self, pixel_values: torch.Tensor) -> None:
        """Show the pool some training images of the task that has begun, before it is learnt.

        Rows begin from them (`init="patches"`, `key_init="queries"`), a pool that they find full grows
        (`growth="adaptive"`), and the weight of orthogonality follows from how they are like earlier tasks'
        (`adaptive_orthogonality`). `ContinualTrainer` does this; without those settings nothing happens.

        Args:
            pixel_values: (B, C, H, W), some hundred images without augmentation, drawn from all of the task.
        """
        if self.wants_images:
            self.look(*self.looks_of(pixel_values))

    def looks_of(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a pool sees of images: the frozen features (B, D), and their patches' embeddings (patches, width)."""
        query = self.encoder.query(pixel_values)[:, : self._active_config()[1].geometry.hidden_size]
        return query, self.encoder.patches(pixel_values)

    def look(self, query: torch.Tensor, patches: torch.Tensor) -> None:
        """`look_at`, of what `looks_of` gives: several processes must see the same."""
        config, pool = self._active_config()[1], self.pool
        pool.look(query, patches)
        config.rows_in_use = pool.rows_in_use
