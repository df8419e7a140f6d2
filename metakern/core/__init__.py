"""What every other room uses: the choice of a backend, the machine, files, checks that are remembered."""
