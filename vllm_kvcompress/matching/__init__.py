"""Attention Matching: a few keys, biases and values that answer queries as all of a head's tokens do."""

from vllm_kvcompress.matching.fit import Fit, fit
from vllm_kvcompress.matching.memory import parts_of, peak_bytes, solve_bytes_on, whole_bytes
from vllm_kvcompress.matching.nnls import nnls
from vllm_kvcompress.matching.parts import Own, fit_by_parts, padded, select_by_parts
from vllm_kvcompress.matching.problem import Problem
from vllm_kvcompress.matching.reference import Reference, attend, chunk_bytes_on
from vllm_kvcompress.matching.selection import select_highest, select_omp
from vllm_kvcompress.matching.units import Units, finish, within

__all__ = [
    "Fit",
    "Own",
    "Problem",
    "Reference",
    "Units",
    "attend",
    "chunk_bytes_on",
    "finish",
    "fit",
    "fit_by_parts",
    "nnls",
    "padded",
    "parts_of",
    "peak_bytes",
    "select_by_parts",
    "select_highest",
    "select_omp",
    "solve_bytes_on",
    "whole_bytes",
    "within",
]
