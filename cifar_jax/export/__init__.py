"""Results in files that other programs read."""
