"""The training loop: models and heads, the step, its checkpoints and its record."""
