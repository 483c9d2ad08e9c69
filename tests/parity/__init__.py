"""Parity with real Keras; `make parity` runs it. A package, so that its conftest does not hide tests/conftest.py."""
