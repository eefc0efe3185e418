"""What a process owes its user: whole files, clear failures, signals, memory, no secrets in its output."""
