"""MLflow as a tracker, as a second registry of models, and its pages in a browser.

Only processes that follow or synchronise import MLflow, and only inside functions: `connection` is the one place.
"""
