"""From a request to trained weights: recipe, frozen-prefix features, solved head, optimiser, checkpoints, the training loop."""
