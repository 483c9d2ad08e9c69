"""Parity tests with reference libraries, run by `make parity`; a package, so its conftest does not shadow the other."""
