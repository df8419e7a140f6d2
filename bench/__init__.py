"""Speed and memory, measured against what a PyTorch user would write without this package."""
