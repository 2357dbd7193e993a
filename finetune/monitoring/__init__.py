"""What live answers are compared with and how: a version's reference, the window of its last answers, drift, sampled inputs."""
