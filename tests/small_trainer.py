"""A trainer of a one-vector method, for tests of the training loop and of what goes wrong in it."""

import dataclasses
import math

import torch
from accelerate import Accelerator

from am_diffusers.matching import MatchingBatch, matching_loss
from am_diffusers.methods.base import Collected, Method
from am_diffusers.system.processes import Processes
from am_diffusers.training.metrics import MetricsLog
from am_diffusers.training.state import TrainState
from am_diffusers.training.trainer import Hooks, Trainer, TrainOptions
from am_diffusers.velocity import CallableField, Conditioning

PROMPTS = [f"prompt {i}" for i in range(5)]


class Regression(Method):
    """Rows with a random target; the policy is one trained vector. `broken` names what gets a NaN."""

    needs_reward_gradient = False

    @classmethod
    def law(cls, shared, own):
        return ""

    def __init__(self, weight, broken=None):
        self.policy = CallableField(lambda x, sigma, cond: x * weight)
        self.broken, self.seen = broken, []

    def collect(self, cond, generators, shared):
        self.seen.append((cond.prompts, [g.initial_seed() for g in generators], shared.initial_seed()))
        latents = torch.stack([torch.randn(3, generator=g) for g in generators])
        target = latents.roll(1, 1)
        if self.broken == "target":
            target[0] = math.nan
        rows = torch.ones(len(cond)) / len(cond)
        batch = MatchingBatch(latents, rows * 2, target, rows, torch.arange(len(cond)), cond)
        return Collected(batch, rows, {"reward": 1.0, "masked": 0.0})

    def loss(self, example):
        loss = matching_loss(self.policy, example)
        if self.broken == "gradient":
            loss = loss + (self.policy(example.latents * 0, None, None)).abs().sqrt().sum()
        return loss, {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def make_trainer(
    tmp_path, *, broken=None, show=lambda iteration: {}, hooks=(), stop=None, start=0, **changes
):
    hooks = dict(hooks)
    weight = torch.nn.Parameter(torch.zeros(3))
    method = Regression(weight, broken)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 1 / (1 + iteration))
    options = TrainOptions(
        seed=7,
        train_batch_size=8,
        max_train_steps=6,
        loss_micro_batch_size=8,
        max_grad_norm=1e9,
        validation_steps=4,
    )
    trainer = Trainer(
        method,
        TrainState({"weight": weight}, optimizer, schedule),
        dataclasses.replace(options, **changes),
        prompts=PROMPTS,
        hooks=Hooks(lambda prompts: Conditioning(tuple(prompts)), show, **hooks),
        processes=Processes(Accelerator(cpu=True), stop),
        log=MetricsLog(tmp_path / "metrics.jsonl", total=6, start=start),
    )
    return trainer, method, weight
