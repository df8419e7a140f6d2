"""inner_update against its peers."""
