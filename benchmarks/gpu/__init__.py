"""What the CUDA back end costs on a GPU: `python -m benchmarks.gpu docs/results`."""
