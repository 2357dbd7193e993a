"""What ships and what runs it: decoding, preprocessing, the manifest, the predictor, the registry of models. Torch-free."""
