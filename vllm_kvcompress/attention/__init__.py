"""Attention over compacted requests: vLLM's backends, told where each head's pages are."""
