"""Benchmarks of hrnn_step."""
