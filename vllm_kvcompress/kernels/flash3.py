"""Attention of chunks over compacted pages and the raw tail, by the FlashAttention 3 that vLLM brings.

A chunk is a row of many queries, as of a prompt that goes on after a compaction. One call attends to the raw
tail, all KV heads at a time and causally; another one to the runs, for which every (KV head, chunk) pair is a
sequence of a single KV head, whose keys all of its queries see. A pair's keys are a part of one list of the
chunks' pages, from `leftpad_k` up to `seqused_k`, and the list is every pair's page table, by a stride of 0.
What both found is merged by their log-sum-exps.

Nothing that is read here was run: `tests/flash3.py` has the operator's part, as its source says it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.batch import Rows, Runs

MIN_QUERIES = 64  # of a chunk
TILE_ROWS = 128  # queries times group that one of its programs works on
AT_ONCE = 16  # queries of a program that merges
ARGUMENTS = (  # of the operator, in vLLM 0.32
    "q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q "
    "max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale "
    "v_descale softmax_scale is_causal window_size_left window_size_right softcap is_rotary_interleaved "
    "scheduler_metadata num_splits pack_gqa sm_margin s_aux cp_world_size cp_rank cp_tot_seqused_k"
).split()


@dataclass(frozen=True)
class Chunk:
    """A row of a batch, compacted to raw pages, as the host knows it.

    Attributes:
        row: its number.
        first: of its queries, among those of the batch.
        queries: that it has.
        slot: its state slot in `Runs`.
        blocks: that its runs are in.
    """

    row: int
    first: int
    queries: int
    slot: int
    blocks: int


@dataclass(frozen=True)
class Chunks:
    """The chunks of a batch, X queries of C rows, for every layer.

    Attributes:
        tokens: `[X]` int64, the queries' places in the batch.
        rows: `[C]` int64, numbers of the rows.
        query_lens: `[R]` int32, queries of each row of the batch; 0 of rows that are no chunks.
        boundary: `[R]` int32, first raw token of each row; 0 likewise.
        max_query_len: queries of the longest chunk.
        query_starts: `[H·C + 1]` int32, where the queries of each (KV head, chunk) pair begin, were they
            brought together by KV head.
        run_starts: `[L, H·C]` int32, tokens before a pair's run in `pages`.
        run_ends: `[L, H·C]` int32, likewise with the run.
        pages: `[n]` int32, physical pages of the chunks' runs, of all layers.
    """

    tokens: Tensor
    rows: Tensor
    query_lens: Tensor
    boundary: Tensor
    max_query_len: int
    query_starts: Tensor
    run_starts: Tensor
    run_ends: Tensor
    pages: Tensor

    @classmethod
    def of(
        cls,
        chunks: Sequence[Chunk],
        runs: Runs,
        num_rows: int,
        cache: tuple[int, int, int, int],
        pinned: bool = False,
    ) -> "Chunks":
        """Bring together what the calls need; sends one array to the device and waits for nothing.

        Args:
            chunks: in order of their rows, at least one.
            runs: where they have their pages.
            num_rows: R.
            cache: its slots, the blocks of each, KV heads, and tokens of a page: S, B, H and N.
            pinned: whether to send from pinned memory.
        """
        num_slots, num_blocks, heads, block_size = cache
        device, count = runs.start.device, len(chunks)
        ends = torch.tensor([chunk.queries for chunk in chunks]).cumsum(0)
        starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
        pairs = torch.arange(heads)[:, None] * ends[-1] + starts
        blocks = torch.tensor([chunk.blocks for chunk in chunks])
        before = (blocks.cumsum(0) - blocks) * num_slots * heads  # pages of the chunks before
        most, width = int(blocks.sum()) * num_slots * heads * block_size, runs.destination.shape[1]
        assert max(most, num_slots * num_blocks * heads) < 2**31 and runs.destination.is_contiguous()
        parts = (
            torch.cat([torch.arange(chunk.first, chunk.first + chunk.queries) for chunk in chunks]),
            torch.tensor([chunk.row for chunk in chunks]),
            torch.tensor([chunk.slot for chunk in chunks]),
            torch.cat([pairs.flatten(), heads * ends[-1:]]),
            before,
            torch.cat([torch.arange(chunk.blocks) + chunk.slot * width for chunk in chunks]),
        )
        host = torch.cat(parts)
        sent = (host.pin_memory() if pinned else host).to(device, non_blocking=True)
        tokens, rows, slots, pairs, before, blocks = sent.split([len(part) for part in parts])

        place = torch.arange(num_slots * heads, device=device)  # of a page in its block
        of_place = place // heads * (num_blocks * heads) + place % heads
        pages = runs.destination.view(-1)[blocks][:, None] * heads + of_place
        edges = (runs.start[slots] + before[:, None]) * block_size
        run_starts, run_ends = (
            part.unflatten(1, (-1, heads)).permute(1, 2, 0).flatten(1).to(torch.int32)
            for part in (edges[:, :-1], edges[:, 1:])
        )
        query_lens, boundary = torch.zeros(2, num_rows, dtype=torch.int32, device=device)
        query_lens[rows] = torch.diff(pairs[: count + 1]).to(torch.int32)
        boundary[rows] = runs.boundary[slots]
        return cls(
            tokens=tokens,
            rows=rows,
            query_lens=query_lens,
            boundary=boundary,
            max_query_len=max(chunk.queries for chunk in chunks),
            query_starts=pairs.to(torch.int32),
            run_starts=run_starts,
            run_ends=run_ends,
            pages=pages.flatten().to(torch.int32),
        )


def is_missing(device: torch.device) -> str | None:
    """Why the operator cannot be called; None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it needs a GPU of compute capability 9.x"
    if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        return "this vLLM has none"
    if [each.name for each in torch.ops._vllm_fa3_C.fwd.default._schema.arguments] != ARGUMENTS:
        return "this vLLM's takes other arguments than 0.32's"
    return None


def fill(query_lens: Sequence[int], group: int, heads: int, processors: int) -> bool:
    """Whether chunks of so many queries are work for every multiprocessor, without a run being cut.

    Args:
        query_lens: queries of each chunk.
        group: query heads of each KV head.
        heads: KV heads.
        processors: streaming multiprocessors of the device.
    """
    return heads * sum(-(-length * group // TILE_ROWS) for length in query_lens) >= processors


def chunk_bytes(max_tokens: int, query_heads: int, head_size: int, itemsize: int) -> int:
    """A bound on the bytes that a layer's calls take beside its output.

    Args:
        max_tokens: of a batch.
        query_heads: Hq.
        head_size: D.
        itemsize: bytes of a number of the model's.
    """
    # Queries by KV head, what is found in the runs, and two log-sum-exps of each.
    return max_tokens * query_heads * (2 * head_size * itemsize + 2 * 4)


def attend_chunks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Runs,
    rows: Rows,
    chunks: Chunks,
    layer: int,
    scale: float,
    max_keys: int,
    out: Tensor,
    logits_soft_cap: float = 0.0,
) -> None:
    """Attention of a batch's chunks over what each KV head holds; as of `kernels.attention.attend`.

    Args:
        query: `[T, Hq, D]`, float16 or bfloat16.
        keys: `[S, B, H, N, D]`, a view of the cache in query's dtype; any strides but 1 for the last.
        values: `[S, B, H, N, D]`, likewise and with the same strides.
        runs: where compacted rows have their pages.
        rows: the batch.
        chunks: those rows of it that are served; all others' part of the result is left alone.
        layer: which of the L layers.
        scale: softmax scale.
        max_keys: a bound on the raw tokens of a row.
        out: `[T, Hq, D]` for the result, in query's dtype.
        logits_soft_cap: 0 for none.
    """
    heads, block_size, head_size = keys.shape[2:]
    own, group = runs.slot_of(layer), query.shape[1] // heads
    _, tail_lse = _forward(
        query,
        *(cache[own].transpose(1, 2) for cache in (keys, values)),
        out,
        rows.query_start_loc,
        chunks.query_lens,
        chunks.boundary,
        rows.seq_lens,
        (chunks.max_query_len, max_keys),
        rows.block_table,
        True,
        scale,
        logits_soft_cap,
    )
    by_head = query.unflatten(1, (heads, group)).transpose(0, 1).index_select(1, chunks.tokens)
    run_out, run_lse = _forward(
        by_head.flatten(0, 1),
        *(cache.flatten(0, 2)[:, :, None] for cache in (keys, values)),
        None,
        chunks.query_starts,
        None,
        chunks.run_starts[layer],
        chunks.run_ends[layer],
        (chunks.max_query_len, len(chunks.pages) * block_size),
        chunks.pages.expand(len(chunks.query_starts) - 1, -1),
        False,
        scale,
        logits_soft_cap,
    )
    num_queries = len(chunks.tokens)
    _merge_runs_kernel[triton.cdiv(num_queries, AT_ONCE), query.shape[1]](
        out,
        tail_lse,
        run_out,
        run_lse,
        chunks.tokens,
        num_queries,
        *out.stride()[:2],
        *tail_lse.stride(),
        *run_out.stride()[:2],
        *run_lse.stride(),
        GROUP=group,
        HEAD_SIZE=head_size,
        CHANNELS=triton.next_power_of_2(head_size),
        QUERIES=AT_ONCE,
    )


def _forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor | None,
    query_starts: Tensor,
    query_lens: Tensor | None,
    key_starts: Tensor,
    key_ends: Tensor,
    most: tuple[int, int],
    pages: Tensor,
    causal: bool,
    scale: float,
    logits_soft_cap: float,
) -> tuple[Tensor, Tensor]:
    """Attention of b sequences, and the natural logarithm of the softmax's denominator.

    Args:
        query: `[t, hq, D]`.
        keys: `[pages, N, h, D]`.
        values: `[pages, N, h, D]`.
        out: `[t, hq, D]` for the result, which is left alone where there is no query; made if absent.
        query_starts: `[b + 1]` int32, where a sequence's queries begin.
        query_lens: `[b]` int32, how many there are of each; as many as there is room for if not given.
        key_starts: `[b]` int32, first token of `pages` that is a sequence's.
        key_ends: `[b]` int32, one past its last one.
        most: bounds on the queries, and on the tokens of pages, of a sequence.
        pages: `[b, w]` int32.
        causal: a sequence's last query sees all of its keys, each earlier one sees one key less; else all do.
        scale: softmax scale.
        logits_soft_cap: 0 for none.

    Returns:
        `[t, hq, D]`, 0 where a sequence has no keys, and `[hq, t]` float32, -inf there.
    """
    out, lse, _, _ = torch.ops._vllm_fa3_C.fwd(
        query,
        keys,
        values,
        None,  # k_new
        None,  # v_new
        None,  # q_v
        out,
        query_starts,
        None,  # cu_seqlens_k
        None,  # cu_seqlens_k_new
        query_lens,
        key_ends,
        *most,
        pages,
        None,  # kv_batch_idx
        key_starts,
        None,  # rotary_cos
        None,  # rotary_sin
        None,  # seqlens_rotary
        None,  # q_descale
        None,  # k_descale
        None,  # v_descale
        scale,
        causal,
        -1,  # window_size_left
        -1,  # window_size_right
        logits_soft_cap,
        True,  # is_rotary_interleaved
        None,  # scheduler_metadata
        1,  # num_splits: more would take memory by the longest sequence that there might be
        None,  # pack_gqa
        0,  # sm_margin
        None,  # s_aux
        1,  # cp_world_size
        0,  # cp_rank
        None,  # cp_tot_seqused_k
    )
    return out, lse


@triton.jit(do_not_specialize=["num_queries"])
def _merge_runs_kernel(
    out,  # [T, Hq, D], of the tails
    tail_lse,  # [Hq, T] float32
    run_out,  # [H·X, G, D]
    run_lse,  # [G, H·X] float32; -inf of runs without tokens
    tokens,
    num_queries,
    out_token,
    out_head,
    tail_lse_head,
    tail_lse_token,
    run_query,
    run_member,
    run_lse_member,
    run_lse_query,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    number, query_head = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.program_id(1)
    real = number < num_queries
    token = tl.load(tokens + number, mask=real, other=0)
    member = query_head % GROUP
    pair = (query_head // GROUP).to(tl.int64) * num_queries + number
    of_tail = tl.load(tail_lse + query_head * tail_lse_head + token * tail_lse_token, mask=real, other=0.0)
    at = run_lse + member * run_lse_member + pair * run_lse_query
    of_run = tl.load(at, mask=real, other=-float("inf"))
    peak = tl.maximum(of_tail, of_run)  # finite: a query sees itself at least, in the tail
    tail_weight, run_weight = tl.exp(of_tail - peak), tl.exp(of_run - peak)
    total = tail_weight + run_weight

    channel = tl.arange(0, CHANNELS)
    mask = real[:, None] & (channel < HEAD_SIZE)[None, :]
    out_at = out + (token * out_token + query_head * out_head)[:, None] + channel[None, :]
    run_at = run_out + (pair * run_query + member * run_member)[:, None] + channel[None, :]
    tail = tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
    run = tl.load(run_at, mask=mask, other=0.0).to(tl.float32)
    result = tail * (tail_weight / total)[:, None] + run * (run_weight / total)[:, None]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=mask)
