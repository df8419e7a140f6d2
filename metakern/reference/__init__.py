"""Every operator in plain PyTorch: its definition, and the oracle that each kernel is held to."""
