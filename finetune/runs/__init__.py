"""Carry out one run: resolve the request, build the network, train it, evaluate it on every split, export it. Start at `run`."""
