"""Frozen weights spread over processes (FSDP2, torch.distributed.fsdp.fully_shard)."""

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard_frozen(transformer: SD3Transformer2DModel, mesh: DeviceMesh) -> None:
    """Spread the weights that aren't trained over the processes of a mesh; each block is gathered when used.

    The LoRA stays whole on each process, with gradients, files and checkpoints as without sharding. From
    here on all processes must make the same calls of the transformer, in the same order.

    Args:
        transformer: with its LoRA; changed in place.
        mesh: one-dimensional.
    """
    for module in [*transformer.transformer_blocks, transformer]:
        trained = {p for p in module.parameters() if p.requires_grad}
        fully_shard(module, mesh=mesh, ignored_params=trained)
