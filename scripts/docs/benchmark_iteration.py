"""Time a training iteration against its bare transformer, VAE and reward passes.

`python scripts/docs/benchmark_iteration.py --config configs/tiny_sd3.yaml [--flag value ...]` takes the flags
of finetune.py. Iterations and bare passes take turns, so that other load on the machine meets both.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from am_diffusers.config import Config
from am_diffusers.config.command_line import parse_config
from am_diffusers.models.adapters import adapters
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.load import encoder, latent_spec, load_model, load_reward, weighted
from am_diffusers.run.plan import make_plan
from am_diffusers.run.surroundings import make_method
from am_diffusers.run.training import make_log, make_state, make_trainer
from am_diffusers.system.processes import Processes
from am_diffusers.training.trackers import Trackers
from am_diffusers.training.trainer import Hooks, Trainer
from am_diffusers.velocity import Conditioning

WARM_UP, ROUNDS = 2, 7


class BarePasses:
    """The passes of one iteration on random inputs of the right sizes, nothing around them."""

    def __init__(self, config: Config, model: Model, reward: Reward, prompts: list[str]) -> None:
        batch = config.optimizer.train_batch_size
        self.prompts = (prompts * batch)[:batch]
        self.config, self.model, self.reward = config, model, reward
        self.cond = encoder(config, model, 1.0)(self.prompts)
        latents = latent_spec(config, model)
        self.x = torch.randn(batch, *latents.shape, device=latents.device)

    def velocity(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Make one transformer call at sigma 0.5."""
        return self.model.velocity(x, x.new_full((len(x),), 0.5), cond)

    def chunks(self, rows: int, size: int | None) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield `rows` rows of random states with their samples, at most `size` at a time."""
        for part in torch.arange(rows).split(size or rows):
            samples = (part % len(self.x)).tolist()
            yield self.x[samples], samples

    def rollout(self, adapter: bool) -> None:
        """Make one transformer call without gradient for every sample."""
        with torch.no_grad(), adapters(self.model.switches, enabled=adapter):
            for x, rows in self.chunks(len(self.x), self.config.optimizer.rollout_micro_batch_size):
                self.velocity(x, self.cond.index(rows))

    def vjp(self) -> None:
        """Make one base call and its backward pass to the state for every sample."""
        with adapters(self.model.switches, enabled=False):
            for x, rows in self.chunks(len(self.x), self.config.optimizer.rollout_micro_batch_size):
                x = x.requires_grad_(True)
                velocity = self.velocity(x, self.cond.index(rows))
                torch.autograd.grad(velocity, x, torch.ones_like(velocity))

    def reward_gradient(self) -> None:
        """Decode, score and go back to the latents."""
        for x, rows in self.chunks(len(self.x), self.config.optimizer.reward_micro_batch_size):
            x = x.requires_grad_(True)
            scores = self.reward(self.model.decode(x), [self.prompts[row] for row in rows])
            torch.autograd.grad(scores.sum(), x)

    def loss(self, rows: int) -> None:
        """Make policy calls and backward passes to the LoRA over `rows` rows."""
        for x, samples in self.chunks(rows, self.config.optimizer.loss_micro_batch_size):
            loss = self.velocity(x, self.cond.index(samples)).square().sum()
            torch.autograd.grad(loss, self.model.lora_parameters().values())

    def passes(self, kept: float) -> dict[str, tuple[int, Callable[[], None]]]:
        """Return count and code of each kind of pass, when a share `kept` of the rows is trained on."""
        steps = self.config.shared.num_inference_steps
        trained = steps - 1 if self.config.shared.loss_steps == "all" else self.config.shared.loss_steps
        rows = round(kept * trained * len(self.x))
        return {
            "policy, forward (rollout)": (steps - 1, lambda: self.rollout(True)),
            "base, forward and backward (adjoint)": (steps - 1, self.vjp),
            "base, forward (step 0)": (int(trained == steps - 1), lambda: self.rollout(False)),
            "VAE and reward, forward and backward": (1, self.reward_gradient),
            "policy, forward and backward (loss)": (1, lambda: self.loss(rows)),
        }


def seconds(code: Callable[[], object]) -> tuple[float, float]:
    """Measure wall clock and CPU seconds; the latter leave out what other programs take of the machine."""
    wall, cpu = time.perf_counter(), time.process_time()
    code()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(trainer: Trainer, bare: BarePasses) -> None:
    """Print the median times of an iteration and of its passes."""
    times: dict[str, list[tuple[float, float]]] = {}
    for turn in range(WARM_UP + ROUNDS):
        metrics: dict[str, float] = {}
        took = {"iteration": seconds(lambda out=metrics: out.update(trainer.iterate()))}
        trainer.state.progress.iteration += 1
        for name, (count, code) in bare.passes(1 - metrics["masked"]).items():
            took[name] = seconds(lambda n=count, run=code: [run() for _ in range(n)])
        if turn >= WARM_UP:
            for name, both in took.items():
                times.setdefault(name, []).append(both)
    medians = {
        name: [statistics.median(kind) for kind in zip(*both, strict=True)] for name, both in times.items()
    }
    iteration = medians.pop("iteration")
    medians["all bare passes"] = [sum(kind) for kind in zip(*medians.values(), strict=True)]
    print(f"{'median of ' + str(ROUNDS):<42} {'wall clock':>12} {'CPU time':>12}")
    for name, (wall, cpu) in (medians | {"iteration": iteration}).items():
        print(f"{name:<42} {wall:10.3f} s {cpu:10.3f} s")
    bare_total = medians["all bare passes"]
    ratios = [a / b for a, b in zip(iteration, bare_total, strict=True)]
    print(f"{'iteration / bare passes':<42} {ratios[0]:12.3f} {ratios[1]:12.3f}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = parse_config([*sys.argv[1:], "--output_dir", folder, "--report_to", "none"])
            accelerator = make_accelerator(config)
            plan = make_plan(config, accelerator.num_processes)
            rewards = [
                load_reward(reward, config, accelerator.device) for reward in plan.config.method.rewards
            ]
            model = load_model(plan, accelerator.device)
        except ValueError as error:
            sys.exit(f"error: {error}")
        reward = weighted(rewards, plan.config)
        processes = Processes(accelerator)
        method = make_method(plan, model, reward, processes)
        state = make_state(config.optimizer, model.lora_parameters())
        hooks = Hooks(encoder(plan.config, model, plan.config.shared.rollout_guidance_scale))
        log = make_log(plan.config, Trackers(accelerator), start=0)
        trainer = make_trainer(plan, method, state, hooks=hooks, processes=processes, log=log)
        measure(trainer, BarePasses(config, model, reward, plan.used_train_prompts()))
        trainer.log.close()


if __name__ == "__main__":
    main()
