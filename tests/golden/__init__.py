"""Golden data of reference libraries: tensor names and shapes, and network outputs. Written by tests/make_*.py."""
