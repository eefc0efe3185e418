"""What scripts/docs/target_signal.py measures, on numbers whose shares are known."""

import pytest
import target_signal
import torch


def continuations(share: float, number: int):
    """Two rewards of each state: a part of it, and one of its own; prompts differ by far more."""
    generator = torch.Generator().manual_seed(0)
    state, *own = torch.randn(3, number, target_signal.PROMPTS, generator=generator)
    offset = 10 * torch.arange(target_signal.PROMPTS)
    for each in own:
        rewards = offset + share**0.5 * state + (1 - share) ** 0.5 * each
        yield target_signal.Continued(torch.zeros(1), rewards.flatten())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_what_a_state_decides_is_what_both_continuations_have_in_common(share):
    found = target_signal.share_decided(*continuations(share, 2000))
    assert found == pytest.approx(share, abs=4 / (2000 * target_signal.PROMPTS) ** 0.5)


def test_an_error_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    assert target_signal.with_error(values).endswith(f"+- {values.std() / 20:.3f}")
