"""The version, where everything can import it and the packaging reads it."""

__version__ = "0.1.0"
