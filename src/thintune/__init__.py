"""Fine-tune transformers where memory is scarce."""
