"""From measured layers to a plan: which rank each layer gets under a memory budget."""
