"""The bases in whose coordinates heads write tokens that they keep in part."""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_kvcompress.formats import MixedDim
from vllm_kvcompress.formats.mixed_dim import half
from vllm_kvcompress.worker.candidates import Candidates, Reader


def with_bases(reader: Reader, held: Candidates, format: MixedDim, num_raw: int) -> tuple[Candidates, Tensor]:
    """Give all heads of a request bases, those that they have or new ones.

    They are of the cache's own tokens, all of which are there still, whatever chunks they came in.

    Returns:
        What it holds, with them; `[P, X]` float64, what each part of the format leaves out of raw tokens.
    """
    cache, grid = reader.cache, reader.grid
    size, heads = cache.head_size, len(held.pages)
    shape = 2, heads, size, size
    raw = torch.zeros(shape, dtype=torch.float64, device=cache.device)  # Σ x·xᵀ of keys and values
    mean = torch.zeros(shape[1:3], dtype=torch.float64, device=cache.device)
    before = torch.zeros_like(raw)
    columns = held.num_scored
    for begin, end in reader.head_slices(heads, columns):
        if num_raw:
            pages = held.pages[begin:end, : num_raw // grid.block_size]
            read = cache.read_keys, cache.read_values
            tokens = [half(of_pages(pages)).double() for of_pages in read]
            mean[begin:end] = tokens[0].mean(1)
            for own, part in zip(raw, tokens, strict=True):
                own[begin:end] = part.mT @ part
        if held.records is not None and held.parts is not None:
            present = held.records[begin:end] >= 0
            some = replace(
                held,
                records=held.records[begin:end],
                parts=held.parts[begin:end].masked_fill(~present, -1),
                bases=None if held.bases is None else held.bases[begin:end],
            )
            for own, decoded in zip(before, reader.decoded(some, format), strict=True):
                part = decoded.flatten(1, 2).double()
                own[begin:end] = part.mT @ part
    bases = format.basis.of_moments(*(raw + before))
    if held.parts is not None and held.records is not None and held.bases is not None:
        has = ((held.parts > 0) & (held.records >= 0)).any(1)
        bases = torch.where(has[:, None], held.bases, bases)
    errors = format.errors(raw[0], raw[1], mean, num_raw, bases)
    return replace(held, bases=bases), errors
