"""Accuracy against memory and time: methods, settings and seeds, learning rates tuned on a validation split."""
