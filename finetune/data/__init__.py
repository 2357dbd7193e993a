"""Read labelled images, from any source to batches: index, check, split, augment, load."""
