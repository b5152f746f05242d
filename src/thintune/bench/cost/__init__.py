"""What an optimizer step takes: every way to take the same step, measured in fresh processes."""
