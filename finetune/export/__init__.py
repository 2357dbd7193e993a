"""A trained network becomes a bundle: ONNX graph, manifest and probe, compared with torch on real files before it counts.

Torch traces a network (`graph`, tried before training by `dry_run`) and gives the answers to compare with (`reference`).
Everything after that is torch-free (`template`, `agreement`, `quantize`, `pack`).
"""
