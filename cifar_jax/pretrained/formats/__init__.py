"""Readers of weights files, one per format."""
