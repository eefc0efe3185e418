"""The training loop of a run: method, optimizer, log."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from am_diffusers.config import Config, OptimizerConfig
from am_diffusers.load import encoder
from am_diffusers.methods import Method
from am_diffusers.metrics import MetricsLog
from am_diffusers.models.sd3 import SD3
from am_diffusers.optimizers import OptimizerSettings, make_optimizer
from am_diffusers.plan import Plan
from am_diffusers.processes import Processes
from am_diffusers.rewards import WeightedRewards
from am_diffusers.train_state import TrainState
from am_diffusers.trainer import Hooks, Trainer, TrainOptions

TRACKER_PROJECT = "am_diffusers"


def make_trainer(
    plan: Plan,
    model: SD3,
    reward: WeightedRewards,
    method: Method,
    state: TrainState,
    *,
    processes: Processes,
    validate: Callable[[int], float | None] = lambda iteration: None,
    save: Callable[[], None] = lambda: None,
) -> Trainer:
    """The training loop with its log."""
    config, optimizer = plan.config, plan.config.optimizer

    def raw_rewards() -> dict[str, float]:
        means = {name: scores.mean() for name, scores in reward.drain().items()}
        if processes.number == 1:
            return {f"reward/{name}": mean.item() for name, mean in means.items()}
        mean: Tensor = processes.sum(torch.stack(list(means.values()))) / processes.number
        return {f"reward/{name}": value for name, value in zip(means, mean.tolist(), strict=True)}

    return Trainer(
        method,
        state,
        TrainOptions(
            seed=config.run.seed,
            train_batch_size=optimizer.train_batch_size,
            max_train_steps=optimizer.max_train_steps,
            loss_micro_batch_size=int(optimizer.loss_micro_batch_size),
            max_grad_norm=optimizer.max_grad_norm,
            validation_steps=config.evaluation.validation_steps,
            checkpointing_steps=config.checkpoint.checkpointing_steps,
            max_skipped_iterations=optimizer.max_skipped_iterations,
            early_stopping_patience=config.evaluation.early_stopping_patience,
        ),
        prompts=plan.train_prompts,
        hooks=Hooks(
            encode=encoder(config, model, config.method.rollout_guidance_scale),
            validate=validate,
            save=save,
            forget=reward.drain,
        ),
        processes=processes,
        log=make_log(config, processes.accelerator, state.iteration, raw_rewards),
    )


def make_state(options: OptimizerConfig, parameters: dict[str, torch.nn.Parameter]) -> TrainState:
    """The optimizer over the parameters, its schedule as a function of the iteration, and the EMA."""
    settings = OptimizerSettings(
        learning_rate=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        epsilon=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
    )
    optimizer = make_optimizer(options.optimizer, list(parameters.values()), settings)
    lr_schedule = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )
    ema = EMAModel(parameters.values(), decay=options.ema_decay) if options.use_ema else None
    return TrainState(parameters, optimizer, lr_schedule, ema)


def make_log(
    config: Config, accelerator: Accelerator, start: int, raw_rewards: Callable[[], dict[str, float]]
) -> MetricsLog:
    """metrics.jsonl, the progress bar and the tracker, on the main process."""
    accelerator.init_trackers(TRACKER_PROJECT, init_kwargs={"tensorboard": {"purge_step": start}})
    return MetricsLog(
        Path(config.run.output_dir) / "metrics.jsonl",
        total=config.optimizer.max_train_steps,
        start=start,
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
