"""Train a network: the recipe, the solved head, the optimiser, the training loop and its checkpoints."""
