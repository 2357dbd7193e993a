"""A trained classifier becomes a bundle: ONNX graph, manifest and probe, compared with torch on real files before it counts.

`dry_run_export` runs before training and hands its graph to `export_bundle`, which only puts the trained weights in.
"""

from finetune.export.agreement import Parity, parity
from finetune.export.dry_run import dry_run_export
from finetune.export.graph import DeployModule, Graph
from finetune.export.pack import BundleFacts, export_bundle

__all__ = ["BundleFacts", "DeployModule", "Graph", "Parity", "dry_run_export", "export_bundle", "parity"]
