"""Monitoring in production: reference predictions, the window of recent predictions, drift tests, and sampled inputs."""
