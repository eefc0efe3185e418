"""Make a checked plan into a run: the only place where config, models, method and loop meet."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from am_diffusers.models.base import Model
from am_diffusers.models.origin import weights_sha256
from am_diffusers.run.certificate import make_certifier, with_scale
from am_diffusers.run.evaluation import make_held_out, make_scorer, make_validation, make_verifier
from am_diffusers.run.execution import Run
from am_diffusers.run.folder import begin, claim, open_folder
from am_diffusers.run.init_lora import attach_lora, init_lora_hashes, start_lora
from am_diffusers.run.leftovers import EMA_FOLDER
from am_diffusers.run.load import encoder, load_base, load_rewards, weighted
from am_diffusers.run.micro_batches import find_micro_batches
from am_diffusers.run.plan import Plan
from am_diffusers.run.resume import make_checkpoints, outdated, settings_of
from am_diffusers.run.sharing import about_lora, hub_target, make_sharing
from am_diffusers.run.surroundings import make_method
from am_diffusers.run.training import make_log, make_state, make_trainer, raw_rewards
from am_diffusers.system.processes import Processes
from am_diffusers.system.signals import StopSignal
from am_diffusers.training.checkpoint import Saver
from am_diffusers.training.state import TrainState
from am_diffusers.training.trainer import Hooks

logger = logging.getLogger(__name__)


def build(plan: Plan, accelerator: Accelerator, stop: StopSignal | None = None) -> Run:
    """Load the models and put a run together, as its last checkpoint left it.

    Args:
        plan: what to do.
        accelerator: processes and device.
        stop: polled by all work of the run.

    Raises:
        CheckpointError: the checkpoint can't be resumed; no model is loaded then.
        ValueError: a model or reward cannot be loaded, another run has the folder, or the result couldn't
            be uploaded; says what to do.
    """
    config = plan.config
    processes = Processes(accelerator, stop, lockstep=config.model.shard_weights)
    processes.on_main(lambda: warn(plan))
    checkpoints = make_checkpoints(config)
    processes.on_main(lambda: claim(config, checkpoints))
    target = processes.from_main(lambda: hub_target(config))
    lock, found, trackers, stale = open_folder(plan, checkpoints, processes)
    # The model first: once its text encoders are freed there is room for the rewards.
    model, base_sha256 = place_model(plan, processes, fresh=found is None)
    with processes.together():
        trained, held_out = load_rewards(plan, accelerator.device)
    plan = find_micro_batches(plan, model, trained, processes)
    settings = settings_of(plan)  # with reward_scale auto as it was given, whose scores are in the folder
    plan = with_scale(plan, model, trained, held_out, processes)
    reward = weighted(trained, config)
    method = make_method(plan, model, reward, processes)
    reward.drain()  # scores of the base images that normalised a divergence belong to no iteration
    state = make_state(config.optimizer, model.lora_parameters())
    about = partial(about_lora, plan, model.family, base_sha256, init_lora_hashes(config))
    save_lora = lora_writer(model, state, about)
    saver = Saver(checkpoints, processes, state, method, settings, save_lora, config.checkpoint.on_full_disk)
    if found is not None:
        saver.restore(found, outdated=outdated(found, saver.settings))
    scorer, roles = make_scorer(plan, model, trained, held_out)
    certify = make_certifier(plan, model, trained, held_out, processes)
    hooks = Hooks(
        encode=encoder(config, model, config.shared.rollout_guidance_scale),
        validate=make_validation(plan, scorer, roles, processes, trackers, certify),
        save=saver.save,
        more=partial(raw_rewards, reward, processes),
        forget=reward.drain,
    )
    processes.on_main(lambda: begin(plan.config, stale or {}, state.progress))
    log = make_log(config, trackers, start=state.iteration)
    return Run(
        trainer=make_trainer(plan, method, state, hooks=hooks, processes=processes, log=log),
        save_lora=save_lora,
        verify_lora=make_verifier(plan, model),
        held_out=make_held_out(plan, scorer, roles, certify) if plan.eval_prompts else None,
        share=make_sharing(plan, processes, target, model.family),
        processes=processes,
        folder=checkpoints.folder,
        lock=lock,
    )


def place_model(plan: Plan, processes: Processes, *, fresh: bool) -> tuple[Model, str]:
    """Load the model with the run's LoRA, spread over the processes if asked for.

    Args:
        plan: the run.
        processes: processes of the run.
        fresh: the LoRA starts as `--init_lora` says; False if a checkpoint's weights follow.

    Returns:
        The model, and the hash of its base weights, without a LoRA that was put into them.
    """
    device = processes.accelerator.device
    with processes.together():
        model = load_base(plan, device)
        base_sha256 = weights_sha256(model.network)
        attach_lora(model, plan.config)
        if fresh:
            start_lora(model, plan.config)
    model.before_pass = processes.poll
    if plan.config.model.shard_weights:
        model.shard(init_device_mesh(device.type, (processes.number,)))
    return model, base_sha256


def warn(plan: Plan) -> None:
    """Log what a user should know before the run."""
    for text in plan.cautions():
        logger.warning("%s", text)


def lora_writer(
    model: Model, state: TrainState, about: Callable[[int], dict[str, str]]
) -> Callable[[Path], list[Path]]:
    """Return a function that writes the LoRA into a folder, and its running mean into `ema` there.

    `about` tells of the run after a number of iterations, for the files' metadata.
    """

    def write(folder: Path) -> list[Path]:
        files = [model.save_lora(folder, about(state.iteration))]
        if state.ema is not None:
            with state.ema_weights():
                files.append(model.save_lora(folder / EMA_FOLDER, about(state.iteration)))
        return files

    return write
