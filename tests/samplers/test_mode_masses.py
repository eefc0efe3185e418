"""Two modes of mass .3 and .7, controls by bins: what each sampler makes of the masses."""

import mode_masses
import pytest


def test_gradients_do_not_see_the_masses_of_separated_modes():
    """Adjoint Sampling settles at another mass under a good bound; its path weights see it."""
    last = mode_masses.adjoint_sampling(14, 5000)[-1]
    assert last.elbo > -0.12
    assert 0.32 < last.mass < 0.42
    assert last.effective_share > 0.75
    assert last.resampled_mass == pytest.approx(0.3, abs=0.03)  # 4 standard errors


@pytest.mark.slow
def test_annealing_with_its_source_stage_finds_the_masses_and_without_it_does_not():
    """With 20000 samples: of 5000, a bin's mean is so noisy that the source stage overshoots, to .20."""
    staged, without = (
        mode_masses.annealed(sweeps, 20_000, source_from=start) for sweeps, start in ((12, 4), (8, None))
    )
    assert staged[0].mass == pytest.approx(0.485, abs=0.02)
    assert staged[-1].mass == pytest.approx(0.3, abs=0.03)
    assert staged[-1].distance < 0.03
    assert without[-1].mass > 0.4
