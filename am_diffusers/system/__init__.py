"""Duties of a process to its user: whole files, clear failures, signals, memory, no secrets in its output."""
