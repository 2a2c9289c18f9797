"""The training loop and what it is made of; it knows nothing of preference pairs or of DPO."""
