"""finetune: transfer-learning fine-tuning for image classification, from labelled photographs to a served ONNX bundle."""

__version__ = "0.1.0"
