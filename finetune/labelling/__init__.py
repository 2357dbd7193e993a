"""What to label next: which unlabelled pictures a model would learn most from, and where to hand them to the people who label."""
