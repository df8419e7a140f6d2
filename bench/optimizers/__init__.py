"""Learned optimizers and tuned baselines on tasks that no choice was made on: ``python -m bench.optimizers``."""
