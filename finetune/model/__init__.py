"""Build the network: pretrained weights, a backbone with named stages, a classifier with its head, and freezing."""
