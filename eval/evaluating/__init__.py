"""What `evaluate.py`, `leaderboard.py` and `bench_methods.py` are made of; it imports the package, never the reverse."""
