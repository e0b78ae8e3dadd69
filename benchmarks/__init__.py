"""Measurements, each beside its peers in the same run. Run as `python -m benchmarks.<name>`."""
