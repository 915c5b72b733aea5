"""A frozen backbone too big for one device, divided over the processes."""

from __future__ import annotations

import torch.distributed
from accelerate import PartialState
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..tuners.base.digests import keep_digests


def shard_backbone(model: PeftModel) -> None:
    """Divide the weights of the frozen backbone's layers over all processes, in place.

    Each process then holds its share of every layer (FSDP2), and gathers a layer when it runs it. Results are the same
    to rounding. The pool and the head are small, grow with each task, and stay whole on every process, as do the
    embeddings. It pays where a device cannot hold the backbone: every pass sends all layers once.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned, before a trainer is made with it. Every
            process loads the backbone whole, into the memory of its CPU.

    Raises:
        ValueError: there is one process alone, or weights of the layers are trained.

    Example:
        >>> args = ContinualTrainingArguments("out")  # sets up the processes
        >>> shard_backbone(model)
        >>> trainer = ContinualTrainer(model, args, scenario, processing_class=processor)
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        raise ValueError(
            "shard_backbone() divides a backbone over processes, but there is one process alone. Start with "
            "`accelerate launch --multi_gpu`, make the ContinualTrainingArguments first, or leave it out."
        )
    encoder = model.base_model.encoder
    layers = encoder.family.layer_list(encoder.base_layer)
    trained = [name for name, parameter in layers.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"shard_backbone() divides frozen layers, but {trained[0]!r} and {len(trained) - 1} more weights are "
            "trained. Leave it out, or call it before anything of the backbone is set to be trained."
        )
    # A group of its own: in the backward pass gradients are summed in between, not at the same place on all processes.
    mesh = DeviceMesh.from_group(torch.distributed.new_group(), PartialState().device.type)
    keep_digests(encoder.base_layer)
    for layer in layers:
        # Whole no longer than it runs, on every process: the first one alone reads all weights when it saves.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # DistributedDataParallel would send them to all processes as if they were whole.
    model._ddp_params_and_buffers_to_ignore = [
        name for name, value in model.named_parameters() if isinstance(value, DTensor)
    ]
