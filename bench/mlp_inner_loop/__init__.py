"""The batched inner loop against its peers."""
