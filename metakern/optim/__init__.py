"""Learned update rules as torch optimizers."""

from metakern.optim.learned_optimizer import FORMAT_VERSION, HEADER, LearnedOptimizer

__all__ = ["FORMAT_VERSION", "HEADER", "LearnedOptimizer"]
