"""Prompt lists of any source, published sets by name, their order in a run, leaks between two lists."""
