"""Optimisation."""

from dataclasses import dataclass
from typing import Literal

LrSchedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
MicroBatch = int | Literal["auto"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimisation.

    Attributes:
        train_batch_size: trajectories an iteration in total, over all processes.
        max_train_steps: iterations (optimizer steps) of the run.
        optimizer: adamw, adamw8bit (moments in 8 bits, by bitsandbytes) or prodigy (finds its rate, by
            prodigyopt); the last two are extras to install.
        learning_rate: peak learning rate; a factor of the rate that prodigy finds, for which 1 is right.
        lr_scheduler: schedule by iteration, a name of `diffusers.optimization.get_scheduler`.
        lr_warmup_steps: iterations of linear warm-up.
        adam_beta1: decay of the gradient's running mean.
        adam_beta2: decay of the squared gradient's running mean.
        adam_epsilon: added to the root of that mean.
        adam_weight_decay: decoupled weight decay of the LoRA weights.
        max_grad_norm: gradients are scaled down to this global norm.
        use_ema: keep a running mean of the LoRA, which grids and evaluation then use; it is written to `ema`
            beside the LoRA itself.
        ema_decay: decay of that mean, in (0, 1); smaller at first: (1 + n) / (10 + n) after n steps.
        max_skipped_iterations: iterations in a row that are left out because a reward, loss or gradient was
            not finite, before the run stops; 0 = it stops at the first.
        rollout_micro_batch_size: samples per call in rollout and adjoint; null = all of a process,
            auto = as many as fit into memory, found before the first iteration by halving.
        reward_micro_batch_size: samples per VAE and reward pass; null = all of a process (of a
            micro-batch of the loss, where the loss takes the rewards), auto as above.
        loss_micro_batch_size: (sample, step) rows per forward and backward of the loss; auto as above.
        offload_trajectories: keep the states and targets of an iteration on the CPU until the loss needs
            them, which saves 2 x train_batch_size x steps latents of device memory.
    """

    train_batch_size: int = 16
    max_train_steps: int = 1000
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    learning_rate: float = 3e-4
    lr_scheduler: LrSchedule = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.95
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    use_ema: bool = False
    ema_decay: float = 0.99
    max_skipped_iterations: int = 0
    rollout_micro_batch_size: MicroBatch | None = None
    reward_micro_batch_size: MicroBatch | None = None
    loss_micro_batch_size: MicroBatch = 16
    offload_trajectories: bool = False
