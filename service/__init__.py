"""The HTTP face: a BentoML service with a FastAPI app mounted in it. Only translates; torch-free."""
