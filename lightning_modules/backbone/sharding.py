"""Leaves every process with its pieces of a model (fully sharded data parallel, FSDP2)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from .structure import Structure


def shard_model(structure: Structure, mesh: DeviceMesh, trained: bool) -> None:
    """Shard the blocks of a model, and what else of it is trained.

    A block's parameters are fetched from the other processes when it runs and dropped behind it. What is not trained
    outside the blocks (embeddings, unembedding, norms) is small and stays whole on every process, so that states can be
    read out without the others.

    Args:
        structure: The parts of the model, with its adapter.
        mesh: The processes, one dimension.
        trained: Whether the parameters that require gradients are trained.
    """
    blocks = [*structure.image_blocks, *structure.blocks]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    model = structure.model
    whole = {one for one in model.parameters() if id(one) not in inside and not (trained and one.requires_grad)}
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for module in (*blocks, model):
        # The tensors that take whole parameters are made once. Made by a first pass in inference mode, they would be of
        # no use in training.
        module.unshard()
        module.reshard()
    # It runs the vision tower before the model itself.
    register_fsdp_forward_method(model, "generate")


def gathered(model: nn.Module, part: str = "") -> dict[str, Tensor]:
    """Tensors of a sharded model, whole, on the CPU of the first process. Every process must call it.

    Args:
        model: The model.
        part: What the names of the wanted tensors have in them.
    """
    whole = {}
    for name, given in model.state_dict().items():
        if part in name:
            value = given.full_tensor() if isinstance(given, DTensor) else given
            if dist.get_rank() == 0:
                whole[name] = value.cpu()
    return whole
