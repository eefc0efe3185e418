"""How large a run's buffer of trajectories will be, before a model is loaded."""

from am_diffusers.config import Config
from am_diffusers.methods.buffered_adjoint_matching import BufferBytes, buffer_bytes
from am_diffusers.noise import LatentSpec

GIB = 2**30


def buffer_size(config: Config, shape: tuple[int, ...]) -> BufferBytes:
    """Return the bytes of the full buffer of latents of a shape over all processes; 0 without a buffer."""
    if config.method.method != "buffered_adjoint_matching":
        return BufferBytes(0, 0, 0)
    steps, batch = config.method.loss_steps, config.optimizer.train_batch_size
    rows = config.method.num_inference_steps - 1 if steps == "all" else steps
    return buffer_bytes(batch, config.buffer.buffer_size // batch, rows, LatentSpec(shape))


def check_buffer(config: Config, shape: tuple[int, ...]) -> None:
    """Refuse a buffer beyond `buffer_max_gb`.

    Raises:
        ValueError: with its size and what makes it smaller.
    """
    size, limit = buffer_size(config, shape), config.buffer.buffer_max_gb
    if size.peak / GIB > limit:
        held = size.falling_out + size.drawn
        raise ValueError(
            f"the buffer would hold {size.peak / GIB:.3g} GiB over all processes, more than --buffer_max_gb "
            f"{limit:g}: {size.stored / GIB:.3g} GiB that it keeps, also in every checkpoint, and "
            f"{held / GIB:.3g} GiB for the collection that falls out and the rows that are drawn: lower "
            "--buffer_size, --loss_steps or --train_batch_size, or raise --buffer_max_gb (--buffer_storage "
            "disk keeps all but the drawn rows out of main memory)"
        )
