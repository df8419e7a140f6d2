"""Benchmarks of task_norm_act_pool."""
