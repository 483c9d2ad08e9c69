"""Devices, processes, signals, timing and caches."""
