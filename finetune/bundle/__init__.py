"""The bundle and everything that serving it needs: decoding, preprocessing, manifest, predictor, model registry. Torch-free."""
