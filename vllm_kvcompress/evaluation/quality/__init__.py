"""What compression costs: answers, divergence and retrieval against the full cache."""
