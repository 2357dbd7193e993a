"""The HTTP server: a FastAPI app, also as a BentoML service. Translates requests into calls. Torch-free."""
