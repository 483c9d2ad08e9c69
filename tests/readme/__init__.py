"""Documents are tests: every command in them is typed, every Python block runs. A package."""
