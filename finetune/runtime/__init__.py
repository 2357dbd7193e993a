"""What every process needs to compute: processor cores, ONNX Runtime sessions, Python's garbage collector. Torch-free."""
