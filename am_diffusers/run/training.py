"""The training loop of a run: method, optimizer, log."""

from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from am_diffusers.config import Config, OptimizerConfig
from am_diffusers.methods import Method
from am_diffusers.rewards import WeightedRewards
from am_diffusers.run.plan import Plan
from am_diffusers.system.processes import Processes
from am_diffusers.training.metrics import MetricsLog
from am_diffusers.training.optimizers import OptimizerSettings, make_optimizer
from am_diffusers.training.state import TrainState
from am_diffusers.training.trackers import Trackers
from am_diffusers.training.trainer import Hooks, Trainer, TrainOptions


def make_trainer(
    plan: Plan, method: Method, state: TrainState, *, hooks: Hooks, processes: Processes, log: MetricsLog
) -> Trainer:
    """Make the training loop."""
    config, optimizer = plan.config, plan.config.optimizer
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
            samples_per_prompt=config.shared.samples_per_prompt,
            checkpointing_steps=config.checkpoint.checkpointing_steps,
            max_skipped_iterations=optimizer.max_skipped_iterations,
            early_stopping_patience=config.evaluation.early_stopping_patience,
            early_stopping_metric=_early_stopping_metric(plan),
        ),
        prompts=plan.train_prompts,
        hooks=hooks,
        processes=processes,
        log=log,
    )


def _early_stopping_metric(plan: Plan) -> str:
    """Return the metric of validations that is to rise."""
    if plan.config.evaluation.early_stopping_metric == "tilt_gap":
        return "validation/objective"  # the gap is a constant less it
    return f"validation/{plan.held_out[0].name}_gain" if plan.held_out else ""


def make_state(options: OptimizerConfig, parameters: dict[str, torch.nn.Parameter]) -> TrainState:
    """Make the optimizer over the parameters, its schedule as a function of the iteration, and the EMA."""
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


def raw_rewards(reward: WeightedRewards, processes: Processes) -> dict[str, float]:
    """Return the mean score of each reward in its own units since the last call, over all processes."""
    means = {name: scores.mean() for name, scores in reward.drain().items()}
    if not means:  # on all processes alike: an iteration that scores no images
        return {}
    if processes.number == 1:
        return {f"reward/{name}": mean.item() for name, mean in means.items()}
    mean: Tensor = processes.sum(torch.stack(list(means.values()))) / processes.number
    return {f"reward/{name}": value for name, value in zip(means, mean.tolist(), strict=True)}


def make_log(config: Config, trackers: Trackers, *, start: int) -> MetricsLog:
    """Open metrics.jsonl, the progress bar and the tracker; lines from iteration `start` on are rewritten."""
    return MetricsLog(
        Path(config.run.output_dir) / "metrics.jsonl",
        total=config.optimizer.max_train_steps,
        start=start,
        enabled=trackers.accelerator.is_main_process,
        bar={
            "loss": "loss",
            "reward": "reward",
            "path KL": "path_kl",
            "adjoint": f"adjoint_norm/{config.shared.num_inference_steps:02d}",
        },
        track=trackers.log,
    )
