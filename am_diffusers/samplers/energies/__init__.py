"""Energies by name, one file a family; any other is `module:Class`."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from am_diffusers.samplers.energies.base import Energy
from am_diffusers.samplers.energies.funnel import Funnel
from am_diffusers.samplers.energies.gaussian import Gaussian
from am_diffusers.samplers.energies.gaussian_mixture import GMM40
from am_diffusers.samplers.energies.many_well import ManyWell
from am_diffusers.samplers.energies.particles import DoubleWellPairs, LennardJones
from am_diffusers.samplers.energies.student_mixture import StudentMixture
from am_diffusers.system.text import suggest

ENERGIES: dict[str, Callable[..., Energy]] = {
    "gaussian": Gaussian,
    "gmm40": GMM40,
    "many_well": ManyWell,
    "funnel": Funnel,
    "student_mixture": StudentMixture,
    "double_well_particles": DoubleWellPairs,
    "lennard_jones": LennardJones,
}


def find_energy(name: str, dimension: int | None = None) -> Energy:
    """Make the energy of a name, or of `module:Class`, which may lie in the working folder.

    Args:
        name: key of `ENERGIES` or `module:Class`, a class that derives from `Energy`.
        dimension: handed to the class; None = its own.

    Raises:
        ValueError: there is none, or not of this dimension; says what to do.
    """
    make = ENERGIES[name] if name in ENERGIES else _class_of(name)
    if dimension is not None:
        make = partial(make, dimension=dimension)
    try:
        found = make()
    except TypeError as error:
        raise ValueError(f"--energy {name}: {error}: the class is called with `dimension` alone") from error
    if not isinstance(found, Energy) or not isinstance(getattr(found, "dimension", None), int):
        raise ValueError(
            f"--energy {name}: must derive from am_diffusers.samplers.energies.base.Energy and have a "
            "whole number `dimension`"
        )
    return found


def _class_of(name: str) -> Callable[..., Energy]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"unknown energy {suggest(name, ENERGIES)}; one of your own is module:Class")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--energy {name}: {error}") from error
    finally:
        sys.path.pop(0)
