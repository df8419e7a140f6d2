"""Distributions of tasks. They know nothing of operators and rules."""

from metakern.tasks.optimizees import DigitsMLP, OptimizeeBatch, Optimizees, Quadratics

__all__ = ["DigitsMLP", "OptimizeeBatch", "Optimizees", "Quadratics"]
