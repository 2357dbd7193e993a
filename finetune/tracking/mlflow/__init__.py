"""MLflow as a tracker and as a second model registry, and links to its pages in a browser.

Only the processes that follow or synchronise runs import MLflow, and only inside functions, since the import takes seconds.
"""
