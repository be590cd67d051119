"""Triton kernels over per-head pages; none of the modules needs vLLM."""
