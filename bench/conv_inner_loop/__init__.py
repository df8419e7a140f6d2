"""The inner loop of convolutional networks against its peers."""
