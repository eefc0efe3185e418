"""Measure the noise of a batch's gradient of Adjoint Matching, and how much of it replay could remove.

`python scripts/docs/gradient_noise.py --config configs/tiny_sd3.yaml [--flag value ...]` takes the flags of
finetune.py. It makes trajectories of SAMPLES samples with the model as it starts, takes the gradient of every
row (sample, denoising step) by itself, and prints for three choices of the steps that a sample is trained on:

- signal / noise: length of the mean gradient over the root mean square length of a batch's error;
- trajectory's share: the part of that mean square error that is left when the same trajectories are trained
  on with all draws of their steps. Only new trajectories average it out, stored ones don't.

Intervals are 95 % jackknives over samples. Rows are not masked.
"""

import sys
import tempfile
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch

from am_diffusers.config import Config
from am_diffusers.config.command_line import parse_config
from am_diffusers.methods.base import Method
from am_diffusers.models.base import Model
from am_diffusers.noise import generator_for, generators_for
from am_diffusers.prompts.order import prompt_rows
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.load import encoder, load_model, load_reward, weighted
from am_diffusers.run.plan import make_plan
from am_diffusers.run.surroundings import make_method
from am_diffusers.system.processes import Processes

SAMPLES = 64
OWN = [
    "--method",
    "adjoint_matching",
    "--loss_steps",
    "all",
    "--mask_quantile",
    "null",
    "--report_to",
    "none",
]


def row_gradients(method: Method, model: Model, config: Config, prompts: list[str]) -> torch.Tensor:
    """Return the gradients of the rows' losses, (N, S, D); summed over rows, of the mean over samples."""
    seed, parameters = config.run.seed, list(model.lora_parameters().values())
    texts = [prompts[row] for row in prompt_rows(seed, 0, SAMPLES, len(prompts))]
    cond = encoder(config, model, 1.0)(texts)
    collected = method.collect(
        cond, generators_for(seed, 0, range(SAMPLES)), generator_for(seed, 0, "shared")
    )
    gradients = []
    for row in collected.examples.split(1):
        loss, _ = method.loss(row)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    return torch.stack(gradients).reshape(SAMPLES, -1, len(gradients[0]))


def draws_of(kind: str, steps: int) -> list[list[float]]:
    """Return the factors of the S rows in each draw of a sample's steps, all equally likely."""
    single = np.eye(steps)
    if kind == "all":
        return [np.ones(steps).tolist()]
    if kind == "one at random":
        return (steps * single).tolist()
    return (single[:-1] + single[-1]).tolist()  # the last one with noise and a random other


def figures(products: np.ndarray, factors: np.ndarray, batch: int, keep: np.ndarray) -> tuple[float, float]:
    """Return (signal / noise of a batch, trajectory's share) of the samples `keep`.

    All samples of a batch share the draw of their steps, as in training: this part of the noise doesn't
    shrink with the batch.

    Args:
        products: inner products of the rows' gradients, (N, S, N, S).
        factors: factors of rows in draws, (draws, S).
        batch: samples per batch.
        keep: indices of samples.
    """
    every = range(products.shape[1])
    chosen = products[np.ix_(keep, every, keep, every)]
    of_draws = [_moments(np.einsum("isjt,s,t->ij", chosen, draw, draw)) for draw in factors]
    mean = factors.mean(0)
    signal, own = _moments(np.einsum("isjt,s,t->ij", chosen, mean, mean))
    signals, scatter = np.array(of_draws).T
    noise = scatter.mean() / batch + (signals.mean() - signal)
    return float(np.sqrt(max(signal, 0) / noise)), float(own / batch / noise)


def _moments(products: np.ndarray) -> tuple[float, float]:
    """Return squared length of the mean of N vectors, unbiased, and variance, from inner products (N, N)."""
    number, own = len(products), float(np.trace(products))
    length = (float(products.sum()) - own) / (number * (number - 1))
    return length, own / number - length


def with_interval(statistic: Callable[[np.ndarray], float]) -> str:
    """Return a statistic of the samples with its jackknife interval."""
    everything = np.arange(SAMPLES)
    value = statistic(everything)
    without = np.array([statistic(np.delete(everything, left)) for left in everything])
    spread = 1.96 * np.sqrt((SAMPLES - 1) / SAMPLES * np.square(without - without.mean()).sum())
    return f"{value:.2f} +- {spread:.2f}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = parse_config([*sys.argv[1:], *OWN, "--output_dir", folder])
            accelerator = make_accelerator(config)
            plan = make_plan(config, accelerator.num_processes)
            model = load_model(plan, accelerator.device)
            rewards = [load_reward(each, config, accelerator.device) for each in config.method.rewards]
        except ValueError as error:
            sys.exit(f"error: {error}")
    reward = weighted(rewards, plan.config)
    method = make_method(plan, model, reward, Processes(accelerator))
    rows = row_gradients(method, model, plan.config, plan.used_train_prompts()).flatten(0, 1)
    steps, batch = len(rows) // SAMPLES, config.optimizer.train_batch_size
    products = (rows @ rows.T).double().numpy(force=True).reshape(SAMPLES, steps, SAMPLES, steps)
    print(f"{SAMPLES} samples, {steps} steps, seed {config.run.seed}")
    print(
        f"{'steps of a sample':<28} {f'signal / noise, batch of {batch}':<28} trajectory's share of the noise"
    )
    for kind in ("all", "the last and one at random", "one at random"):
        factors = np.array(draws_of(kind, steps))

        def both(keep: np.ndarray, which: int, factors: np.ndarray = factors) -> float:
            return figures(products, factors, batch, keep)[which]

        columns = chain([kind], (with_interval(lambda keep, w=w: both(keep, w)) for w in (0, 1)))
        print(" ".join(f"{column:<28}" for column in columns).rstrip())


if __name__ == "__main__":
    main()
