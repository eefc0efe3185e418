"""Config to objects. This file, plan.py (checks) and load.py (weights) are the only ones that see both."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from am_diffusers.build_method import METHOD_BUILDERS
from am_diffusers.command_line import to_yaml
from am_diffusers.config import Config, OptimizerConfig
from am_diffusers.grids import GridWriter
from am_diffusers.load import encoder, guided, load_model, load_rewards, make_sampler, weighted
from am_diffusers.metrics import MetricsLog
from am_diffusers.models.sd3 import SD3
from am_diffusers.plan import Plan
from am_diffusers.rewards import ImageFeatures, Reward
from am_diffusers.run import HeldOut, Run
from am_diffusers.scoring import Scorer, official
from am_diffusers.trainer import Trainer, TrainOptions, TrainState

TRACKER_PROJECT = "am_diffusers"


def make_accelerator(config: Config) -> Accelerator:
    """Processes and device of a run, and its tracker.

    Raises:
        ValueError: if several processes were launched that don't know of each other: each would be a run
            of its own, in the same folder.
    """
    log_with = None if config.run.report_to == "none" else config.run.report_to
    folder = Path(config.run.output_dir) / config.run.logging_dir
    accelerator = Accelerator(log_with=log_with, project_dir=folder)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate joins {accelerator.num_processes}: "
            "on a CPU set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def build(plan: Plan, accelerator: Accelerator) -> Run:
    """Load the models and put a run together; writes the resolved config beside its outputs.

    Raises:
        ValueError: a model or reward cannot be loaded; the message says what to do.
    """
    config, folder = plan.config, Path(plan.config.run.output_dir)
    torch.backends.cuda.matmul.allow_tf32 = config.run.allow_tf32
    if accelerator.is_main_process:
        start_folder(config, folder)
    # The model first: once its text encoders are freed there is room for the rewards.
    model = load_model(plan, accelerator.device)
    trained, held_out = load_rewards(plan, accelerator.device)
    return Run(
        trainer=make_trainer(plan, model, trained, accelerator),
        save_lora=partial(model.save_lora, folder),
        verify_lora=make_verifier(plan, model),
        held_out=make_held_out(plan, model, trained, held_out) if plan.eval_prompts else None,
        accelerator=accelerator,
        folder=folder,
    )


def start_folder(config: Config, folder: Path) -> None:
    """Write the resolved config and remove an earlier run's results; its LoRA stays until it is replaced."""
    logs = folder / config.run.logging_dir / TRACKER_PROJECT
    results = [
        folder / "evaluation.json",
        folder / "error.txt",
        *(folder / "samples").glob("iteration-*.png"),
    ]
    for path in [*results, *logs.glob("events.out.tfevents*")]:
        path.unlink(missing_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), "utf-8")


def make_trainer(plan: Plan, model: SD3, rewards: Sequence[Reward], accelerator: Accelerator) -> Trainer:
    """The training loop with its log and its grids."""
    config = plan.config
    reward = weighted(rewards, config)

    def raw_rewards() -> dict[str, float]:
        means = {name: scores.mean() for name, scores in reward.drain().items()}
        mean: Tensor = accelerator.reduce(torch.stack(list(means.values())), "mean")  # pyright: ignore[reportAssignmentType]
        return {f"reward/{name}": value for name, value in zip(means, mean.tolist(), strict=True)}

    optimizer = config.optimizer
    method = METHOD_BUILDERS[config.method.method](plan, model, reward, accelerator)
    reward.drain()  # scores of the base pictures a divergence was normalised on belong to no iteration
    return Trainer(
        method,
        make_state(optimizer, model.lora_parameters()),
        TrainOptions(
            seed=config.run.seed,
            train_batch_size=optimizer.train_batch_size,
            max_train_steps=optimizer.max_train_steps,
            loss_micro_batch_size=optimizer.loss_micro_batch_size,
            max_grad_norm=optimizer.max_grad_norm,
            validation_steps=config.evaluation.validation_steps,
        ),
        prompts=plan.train_prompts,
        encode=encoder(config, model, config.method.rollout_guidance_scale),
        accelerator=accelerator,
        log=make_log(config, accelerator, raw_rewards),
        show=make_grids(plan, model) if accelerator.is_main_process else lambda iteration: None,
    )


def make_state(options: OptimizerConfig, parameters: list[torch.nn.Parameter]) -> TrainState:
    """AdamW over the parameters and its schedule, a function of the iteration."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
    )
    lr_schedule = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )
    return TrainState(parameters, optimizer, lr_schedule)


def make_log(
    config: Config, accelerator: Accelerator, raw_rewards: Callable[[], dict[str, float]]
) -> MetricsLog:
    """metrics.jsonl, the progress bar and the tracker, on the main process."""
    accelerator.init_trackers(TRACKER_PROJECT)
    return MetricsLog(
        Path(config.run.output_dir) / "metrics.jsonl",
        total=config.optimizer.max_train_steps,
        enabled=accelerator.is_main_process,
        bar={
            "loss": "loss",
            "reward": "reward",
            "path KL": "path_kl",
            "adjoint": f"adjoint_norm/{config.method.num_inference_steps:02d}",
        },
        track=accelerator.log,
        more=raw_rewards,
    )


def make_grids(plan: Plan, model: SD3) -> GridWriter:
    """The base-vs-tuned grids."""
    config = plan.config
    scale = config.evaluation.eval_guidance_scale
    return GridWriter(
        make_sampler(config, model),
        base=guided(model.base, scale),
        tuned=guided(model.policy, scale),
        prompts=plan.validation_prompts,
        images_per_prompt=config.evaluation.num_validation_images,
        folder=Path(config.run.output_dir) / "samples",
    )


def make_verifier(plan: Plan, model: SD3) -> Callable[[Path], dict[str, float]]:
    """Compares a written LoRA with the model, at the first validation prompt."""
    cond = encoder(plan.config, model, 1.0)(plan.validation_prompts[:1])
    side = plan.config.model.resolution

    def verify(file: Path) -> dict[str, float]:
        # Diffusers warns that there's no LoRA for the text encoders, which is so on purpose.
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()
        try:
            return model.verify_lora(file, cond, side, side)
        finally:
            diffusers_logging.set_verbosity(verbosity)

    return verify


def make_held_out(plan: Plan, model: SD3, trained: Sequence[Reward], held_out: Sequence[Reward]) -> HeldOut:
    """The evaluation at the end: published preprocessing, diversity by the first held-out image features."""
    config = plan.config
    rewards = [official(reward) for reward in [*trained, *held_out]]
    with_features = [reward for reward in rewards[::-1] if isinstance(reward, ImageFeatures)]
    scale = config.evaluation.eval_guidance_scale
    scorer = Scorer(
        make_sampler(config, model),
        base=guided(model.base, scale),
        tuned=guided(model.policy, scale),
        rewards=rewards,
        features=with_features[0] if with_features else None,
    )
    roles = {reward.name: "trained" if i < len(trained) else "held-out" for i, reward in enumerate(rewards)}
    return HeldOut(scorer, plan.eval_prompts, config.evaluation.eval_images_per_prompt, roles)
