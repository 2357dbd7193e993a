"""Experiment tracking: a separate process reads a run's folder, live or afterwards, and mirrors it to trackers such as MLflow.

Training code does not depend on it, so a tracker can neither slow a run down nor make it fail, and data that a tracker missed is
sent later from the same files. A tracker is one module that implements `finetune.tracking.tracker.Tracker`, registered in
`TRACKERS`.
"""
