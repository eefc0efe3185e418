"""Samples of the tilted law of a prompt's images, and the check by importance sampling."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from am_diffusers.evaluation.frontier import MIN_IMAGES, MIN_SHARE
from am_diffusers.evaluation.images import ImageId
from am_diffusers.evaluation.statistics import Array
from am_diffusers.noise import generator_for
from am_diffusers.steering.driver import Workshop, write_results
from am_diffusers.steering.mixing import effective_size, split_rhat
from am_diffusers.steering.results import BASE, RESULTS, Candidate
from am_diffusers.steering.tilted_noise import Sampled, Weighted, importance, sample_noise

LARGEST_RHAT = 1.05
LEAST_SIZE = 20.0


def sample_tilt(shop: Workshop) -> Iterator[str]:
    """Run the chains of each prompt and the check; yield lines to print.

    Raises:
        NonFiniteError: if a reward or a gradient is not finite.
    """
    options = shop.plan.options
    base, tilted = Candidate(BASE), Candidate(f"tilt_{options.reward_scale:g}")
    for prompt, text in enumerate(shop.plan.prompts):
        started = time.monotonic()
        rewards = _base_rewards(shop, prompt, base)
        check = importance(rewards, options.reward_scale)
        base.seconds += time.monotonic() - started
        started = time.monotonic()
        found = _run_chains(shop, prompt, tilted)
        tilted.seconds += time.monotonic() - started
        draws = found.rewards.double().cpu().numpy()
        tilted.details[f"prompt {prompt}"] = _numbers(rewards, check, found, draws)
        yield text
        yield from _lines(rewards, check, found, draws)
    write_results(shop, [base, tilted])
    yield f"images, inputs and {RESULTS}: {options.output.resolve()}"


def _base_rewards(shop: Workshop, prompt: int, base: Candidate) -> Array:
    """Return rewards of base noises, (N,), and write the first images."""
    options = shop.plan.options
    which, rewards = [ImageId(prompt, image) for image in range(options.importance)], list[Tensor]()
    for start in range(0, len(which), options.batch_size):
        batch = which[start : start + options.batch_size]
        chain = shop.chain(batch)
        end = chain.end(shop.cond(batch), shop.noise(batch))
        base.passes = chain.passes
        shop.keep(base, batch, end.final)
        rewards.append(end.rewards)
    return torch.cat(rewards).double().cpu().numpy()


def _run_chains(shop: Workshop, prompt: int, tilted: Candidate) -> Sampled:
    options = shop.plan.options
    # Chains start from noises of their own: those of the check stay independent of them.
    which = [ImageId(prompt, number) for number in range(options.chains)]
    generators = [generator_for(options.seed, "chain", *image) for image in which]
    chain, cond = shop.chain(which), shop.cond(which)
    with tqdm(total=2 * options.chain_steps + 1, desc="chains", disable=None) as bar:

        def evaluate(noise: Tensor) -> tuple[Tensor, Tensor]:
            end = chain.differentiated(cond, noise)
            assert end.gradients is not None
            bar.set_postfix(reward=f"{end.rewards.mean().item():.4g}")
            bar.update()
            return end.rewards, -end.gradients.latents

        found = sample_noise(
            evaluate,
            shop.latents.draw(generators),
            generators,
            reward_scale=options.reward_scale,
            steps=options.chain_steps,
            burn_in=options.chain_steps,
            thin=options.thin,
        )
    for number, noise in enumerate(found.noise):
        images = [ImageId(prompt, number * options.chains + image.image) for image in which]
        shop.keep(tilted, images, chain.end(cond, noise).final)
        shop.folder.save_inputs(tilted.name, images, noise, cond, embeddings=False)
    tilted.passes = chain.passes / len(found.noise)
    return found


def _numbers(rewards: Array, check: Weighted, found: Sampled, draws: Array) -> dict[str, object]:
    size = effective_size(draws)
    return {
        "base_mean": float(rewards.mean()),
        "chains": {
            "mean": float(draws.mean()),
            "standard_error": float(draws.std(ddof=1) / np.sqrt(size)),
            "effective_size": size,
            "split_rhat": split_rhat(draws),
            "accepted": found.accepted,
            "delta": found.delta,
            "weights": [1 / found.kept.numel()] * found.kept.numel(),
        },
        "importance": {
            "mean": check.mean,
            "standard_error": check.standard_error,
            "effective_share": check.share,
            "weights": check.weights.tolist(),
        },
    }


def _lines(rewards: Array, check: Weighted, found: Sampled, draws: Array) -> Iterator[str]:
    size, rhat = effective_size(draws), split_rhat(draws)
    error = draws.std(ddof=1) / np.sqrt(size)
    yield f"  base: mean reward {rewards.mean():.4g}, sd {rewards.std(ddof=1):.3g}"
    yield (
        f"  chains: {draws.mean():.4g} +- {1.96 * error:.2g}; accepted {found.accepted:.0%} at step "
        f"{found.delta:.3g}, effective size {size:.0f} of {draws.size}, split R-hat {rhat:.3f}"
    )
    yield (
        f"  importance sampling: {check.mean:.4g} +- {1.96 * check.standard_error:.2g}, "
        f"effective share {check.share:.0%} of {len(rewards)}"
    )
    yield from _warnings(rhat, size, check, len(rewards))


def _warnings(rhat: float, size: float, check: Weighted, number: int) -> Sequence[str]:
    """Return what not to believe."""
    said = []
    if rhat > LARGEST_RHAT or size < LEAST_SIZE:
        said.append(
            f"  the chains have not mixed (want R-hat below {LARGEST_RHAT} and an effective size of "
            f"{LEAST_SIZE:.0f}): raise --chain_steps or --chains, or lower --reward_scale"
        )
    if check.share < max(MIN_SHARE, MIN_IMAGES / number):
        said.append("  too few base images decide the check: raise --importance or lower --reward_scale")
    return said
