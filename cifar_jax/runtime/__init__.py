"""Devices, processes, signals, timing, and the compilation cache."""
