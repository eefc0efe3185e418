"""Estimate of a run before a weight is read: memory by phase, FLOPs, hours on a named card.

The run's own classes are built from configuration files and run for an iteration on tensors without data
(`iteration.py`), which the tracker watches (`tracker.py`). Nothing here was compared with a GPU; on a CPU
tests hold it against the growth of the process.
"""

from am_diffusers.estimate.printing import describe
from am_diffusers.estimate.report import UTILISATION, Estimate, estimate, fits

__all__ = ["UTILISATION", "Estimate", "describe", "estimate", "fits"]
