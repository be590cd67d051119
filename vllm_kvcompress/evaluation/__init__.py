"""Quality, memory and speed of compression, measured side by side with stock vLLM."""
