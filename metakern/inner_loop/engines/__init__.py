"""What can run an inner loop: each engine says whether it serves a call, and if not, why."""
