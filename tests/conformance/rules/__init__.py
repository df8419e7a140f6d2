"""One suite for all update rules; a new rule joins by one row in ``rows.py``."""
