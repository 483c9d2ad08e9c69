"""Export of results to files for other programs."""
