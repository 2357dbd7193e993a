"""One run: a request resolved, the network built, trained, judged on every split, and exported. `run` tells the whole story."""
