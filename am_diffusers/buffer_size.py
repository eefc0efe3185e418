"""How large a run's buffer of trajectories will be, before a model is loaded."""

from am_diffusers.config import Config
from am_diffusers.methods.buffered_adjoint_matching import buffer_bytes
from am_diffusers.models.pretrained import Pretrained, vae_scale
from am_diffusers.rollout import LatentSpec

GIB = 2**30


def buffer_size(config: Config, source: Pretrained) -> int:
    """Bytes of the full buffer over all processes; 0 for a method without one."""
    if config.method.method != "buffered_adjoint_matching":
        return 0
    channels = source.config("transformer/config.json")["in_channels"]
    side = config.model.resolution // vae_scale(source.config("vae/config.json"))
    steps = config.method.loss_steps
    rows = config.method.num_inference_steps - 1 if steps == "all" else steps
    return buffer_bytes(config.buffer.buffer_size, rows, LatentSpec((channels, side, side)))


def check_buffer(config: Config, source: Pretrained) -> None:
    """Refuse a buffer beyond `buffer_max_gb`.

    Raises:
        ValueError: with its size and what makes it smaller.
    """
    size, limit = buffer_size(config, source) / GIB, config.buffer.buffer_max_gb
    if size > limit:
        raise ValueError(
            f"the buffer would hold {size:.3g} GiB over all processes, and as much in every checkpoint, more "
            f"than --buffer_max_gb {limit:g}: lower --buffer_size or --loss_steps, or raise --buffer_max_gb "
            "(--buffer_storage disk keeps it out of main memory)"
        )
