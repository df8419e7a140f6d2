"""What all operators share."""
