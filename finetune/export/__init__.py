"""A trained network becomes a bundle: ONNX graph, manifest and probe, compared with torch on real files before it counts.

Torch traces a network (`graph`, tried before training by `dry_run`) and says what it computes (`reference`); everything after
that does without (`template`, `agreement`, `quantize`, `pack`).
"""
