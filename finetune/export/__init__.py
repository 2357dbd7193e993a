"""Export a trained network as a bundle: ONNX graph, manifest and self-test. Its outputs are compared with torch on image files.

Torch traces the network (`graph`; `dry_run` tries this before training) and computes the outputs to compare with (`reference`).
The other modules are torch-free (`template`, `agreement`, `quantize`, `pack`).
"""
