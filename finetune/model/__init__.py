"""The network: pretrained weights, backbone with named stages, classifier with its head, freezing."""
