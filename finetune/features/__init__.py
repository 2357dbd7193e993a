"""What a frozen backbone computes once: its output for every image, kept in a cache, and the head that is solved on it."""
