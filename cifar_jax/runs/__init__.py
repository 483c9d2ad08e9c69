"""The run directory: its layout, writer, reader and checkpoints, resuming, and prediction with what it holds."""
