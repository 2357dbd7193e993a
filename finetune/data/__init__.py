"""From a source of labelled images to batches: index, check, split, augment, load."""
