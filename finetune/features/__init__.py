"""Compute the output of frozen stages once for every image, cache it, and solve heads on it."""
