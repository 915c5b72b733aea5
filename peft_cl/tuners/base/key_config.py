"""What the configurations of methods that choose prompts by keys share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .pool_config import PoolConfig


@dataclass
class KeyPoolConfig(PoolConfig):
    """Base of the configurations of methods that choose prompts by their keys and pull the keys to their queries."""

    keys_per_layer: bool = field(
        default=False, metadata={"help": "Prefix form: a key set for each prompted layer instead of one for all."}
    )
    pull_form: Literal["cosine", "cosine_distance", "squared_distance", "mean_squared_distance"] = field(
        default="cosine",
        metadata={
            "help": "Pull term: minus the cosine (official), 1 - cosine, or the squared distance of query and key, "
            "summed over their numbers or averaged."
        },
    )
    pull_reduction: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "How the pull term is reduced over the batch."}
    )
    batchwise_prompt_at_test: bool = field(
        default=False,
        metadata={
            "help": "At test, the whole batch takes the rows chosen most often in it. It leaks the task's identity, "
            "as test batches come from one task, and makes results depend on the batch; only for comparison with "
            "code that does so."
        },
    )
    known_task_rows: bool = field(
        default=False,
        metadata={
            "help": "At test, where the task of an image is known (task_ids), choose among the rows of that task "
            "alone."
        },
    )
