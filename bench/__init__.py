"""Benchmarks of speed and memory against the PyTorch code that a user would write without this package."""
