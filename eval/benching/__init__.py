"""Parts of the benchmarks of methods."""
