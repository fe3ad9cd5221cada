"""Weights that FSDP2 has sharded, put together again through torch's own state-dict interface."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has had it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """The trainable weights of a sharded module by name, whole and on the CPU.

    Every process must ask, and the main one is answered; the others get nothing.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    gathered = get_model_state_dict(module, options=options)
    # It gives buffers too.
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = {name: tensor for name, tensor in gathered.items() if name in trained}
    assert all(type(tensor) is torch.Tensor for tensor in found.values())
    return found
