"""Durable jobs: the store, the worker that claims them, the executors that run them. Torch-free."""
