"""The models of the recipe and the benchmarks, one file each."""
