"""Run directories: layout, writer, reader, checkpoints, resuming, and prediction with a trained run."""
