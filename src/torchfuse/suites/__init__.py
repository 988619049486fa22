"""Many models on many machines: what `compare` does of one, run on Dask distributed."""
