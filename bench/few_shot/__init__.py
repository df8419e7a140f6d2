"""Learned update rules in the inner loop of few-shot learning, beside MAML: ``python -m bench.few_shot``."""
