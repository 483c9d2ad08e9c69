"""Engines other than XLA that can run the folded network."""
