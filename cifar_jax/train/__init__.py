"""Training: a task says what trains and how logits come of it; one step, evaluation and loop serve every task."""
