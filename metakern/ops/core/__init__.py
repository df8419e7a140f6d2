"""Shared machinery of all operators: definition, autograd, batching, checks, Triton helpers."""
