"""Benchmarks of task_conv2d."""
