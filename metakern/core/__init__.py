"""Shared basics: backend selection, hardware names, file writing, memoized checks, trees of tensors."""
