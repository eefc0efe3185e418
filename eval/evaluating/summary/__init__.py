"""From measured values to a summary: pairs, intervals, Frechet distances."""
