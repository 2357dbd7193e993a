"""From logits to judgement: metrics, figures, the report. NumPy only; knows neither torch nor ONNX."""
