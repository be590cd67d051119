"""Triton kernels over per-head pages; every module here needs torch and triton, and nothing else."""
