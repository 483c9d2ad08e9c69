"""Training: a task defines what trains and how logits are computed; all tasks share one step, evaluation and loop."""
