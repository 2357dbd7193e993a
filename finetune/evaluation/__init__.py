"""Pure functions of predictions: metrics, intervals, calibration, mistakes. Torch-free.

Every run writes one table of predictions (module `predictions`) for each evaluated split; all else is computed from such tables.
"""
