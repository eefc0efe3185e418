"""The prompts that an iteration takes.

The order is a function of (seed, epoch) alone, so nothing has to be saved to resume it and the number of
processes does not change it.
"""

from collections.abc import Sequence

import torch


def prompt_rows(
    seed: int, iteration: int, batch_size: int, num_prompts: int, samples_per_prompt: int = 1
) -> list[int]:
    """Return the prompts that an iteration takes: every prompt once an epoch, in a new order each epoch.

    Args:
        seed: seed of the run.
        iteration: optimizer step, from 0.
        batch_size: samples an iteration, over all processes; a multiple of `samples_per_prompt`.
        num_prompts: length of the prompt list.
        samples_per_prompt: neighbouring samples that share a prompt.

    Returns:
        `batch_size` indices into the prompt list.
    """
    groups = batch_size // samples_per_prompt
    first = iteration * groups
    epochs = range(first // num_prompts, (first + groups - 1) // num_prompts + 1)
    order = [row for epoch in epochs for row in _permutation(seed, epoch, num_prompts)]
    offset = first - epochs[0] * num_prompts
    return [row for row in order[offset : offset + groups] for _ in range(samples_per_prompt)]


def fill_up(prompts: Sequence[str], pool: Sequence[str], number: int, seed: int) -> list[str]:
    """Return `prompts`, then others of `pool` up to `number`, at random: neighbours in files are alike."""
    own = set(prompts)
    others = [prompt for prompt in pool if prompt not in own]
    missing = max(0, number - len(prompts))
    return [*prompts, *(others[row] for row in _permutation(seed, 0, len(others))[:missing])]


def _permutation(seed: int, epoch: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(((seed << 24) + epoch) % 2**63)
    return torch.randperm(length, generator=generator).tolist()
