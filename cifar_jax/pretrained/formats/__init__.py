"""Readers of weights files, one a format."""
