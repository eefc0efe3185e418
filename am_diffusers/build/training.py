"""The training loop of a run: method, optimizer, log."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor

from am_diffusers.build.method import METHOD_BUILDERS
from am_diffusers.config import Config, OptimizerConfig
from am_diffusers.load import encoder, weighted
from am_diffusers.metrics import MetricsLog
from am_diffusers.models.sd3 import SD3
from am_diffusers.plan import Plan
from am_diffusers.rewards import Reward
from am_diffusers.trackers import Trackers
from am_diffusers.trainer import Trainer, TrainOptions, TrainState


def make_trainer(
    plan: Plan,
    model: SD3,
    rewards: Sequence[Reward],
    accelerator: Accelerator,
    *,
    trackers: Trackers,
    validate: Callable[[int], dict[str, float]],
) -> Trainer:
    """The training loop with its log and its validation."""
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
        log=make_log(config, accelerator, trackers, raw_rewards),
        show=validate,
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
    config: Config,
    accelerator: Accelerator,
    trackers: Trackers,
    raw_rewards: Callable[[], dict[str, float]],
) -> MetricsLog:
    """metrics.jsonl, the progress bar and the tracker, on the main process."""
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
        track=trackers.log,
        more=raw_rewards,
    )
