"""What compression brings: blocks, requests at once and time, against stock vLLM."""
