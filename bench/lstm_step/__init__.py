"""lstm_step against its peers."""
