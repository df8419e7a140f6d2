"""mlp_update_step against its peers."""
