"""Pure functions of predictions: metrics, intervals, calibration, mistakes. Torch-free.

`predictions` is the table that every run writes for every split that it judges; all else is computed from such tables.
"""
