"""Cores, devices, clocks, ONNX Runtime sessions, garbage collection and tracing of a process. Torch-free."""
