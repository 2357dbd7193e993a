"""Active learning: choose the unlabelled images to label next, and export them for annotators."""
