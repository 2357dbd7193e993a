"""Tracking follows: a process of its own reads a run's folder, live or afterwards, and mirrors it into trackers such as MLflow.

Nothing that trains knows of it, so a tracker can neither slow a run nor fail it, and what a tracker missed is sent later from the
same files. A tracker is one module that implements `finetune.tracking.tracker.Tracker` and one line in `TRACKERS`.
"""
