"""The LoRA of a run: fresh, started from another one (`--init_lora`), or trained on one in the base."""

from pathlib import Path

from am_diffusers.config import Config
from am_diffusers.models.base import without_weights
from am_diffusers.models.lora import TunedNetwork
from am_diffusers.models.lora_files import find_lora, sources_of
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.system.files import asset_path, sha256
from am_diffusers.training.checkpoint_folder import Checkpoints


def check_init_lora(config: Config, source: Pretrained) -> None:
    """Try `--init_lora` on the network without weights, unless a checkpoint holds what became of it.

    Raises:
        ValueError: as `attach_lora` and `start_lora`.
    """
    resumes = config.checkpoint.resume_from_checkpoint != "latest"
    resumes = resumes or bool(Checkpoints(Path(config.run.output_dir)).list())
    if config.model.init_lora is None or (resumes and not config.model.init_lora_as_base):
        return
    model = without_weights(source)
    try:
        attach_lora(model, config)
        start_lora(model, config)
    except ValueError as error:
        raise ValueError(f"--init_lora {error}") from error


def attach_lora(model: TunedNetwork, config: Config) -> None:
    """Attach the run's LoRA, on the one that is part of its base if there is one.

    Raises:
        ValueError: if a layer or `--init_lora` doesn't fit.
    """
    options = config.model
    if options.init_lora is not None and options.init_lora_as_base:
        model.fuse_lora(asset_path(options.init_lora))
    model.attach_lora(
        rank=options.rank,
        lora_alpha=options.lora_alpha,
        layers=options.lora_layers,
        seed=config.run.seed,
    )


def start_lora(model: TunedNetwork, config: Config) -> None:
    """Let the run's LoRA start as `--init_lora`, if that isn't part of the base; not after a resume.

    Raises:
        ValueError: if it is no LoRA of this model, or more than the run's LoRA.
    """
    options = config.model
    if options.init_lora is not None and not options.init_lora_as_base:
        model.start_lora(asset_path(options.init_lora))


def init_lora_hashes(config: Config) -> list[str] | None:
    """Return the SHA-256 of the files of a LoRA that is part of the base; None without one."""
    options = config.model
    if options.init_lora is None or not options.init_lora_as_base:
        return None
    return [sha256(file) for file in sources_of(find_lora(asset_path(options.init_lora)))]
