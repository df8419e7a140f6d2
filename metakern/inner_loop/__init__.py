"""The inner loop: K steps of an update rule on a batch of tasks."""
