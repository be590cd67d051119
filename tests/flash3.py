"""Stands in for vLLM's FlashAttention 3 where there is no GPU, to the letter of its source.

Schema, refusals and results are those of `hopper/` in vllm-project/flash-attention, whose operator takes the
arguments of vLLM 0.32's wrapper in its order: at 01ed8aa `flash_api_stable_registration.cpp` (schema) and
`mha_fwd` of `flash_api.cpp` (refusals); as other commits have them `seqlen.h` and `paged_kv.h` (`leftpad_k`
is taken off `seqused_k`, and added to a key's number before its page is looked up), `mask.h` (causal by the
lengths that are left), `softmax.h` (log-sum-exp in base e) and `epilogue_fwd.hpp` (zeros and -inf where
nothing is seen; what has no query is not written). Anything that no caller of ours needs is refused, too.
"""

import torch
from torch import Tensor

SCHEMA = """fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out,
Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k,
Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale,
Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left, int window_size_right,
float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa,
int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""
_LIBRARY: list[torch.library.Library] = []
calls: list[dict[str, int]] = []  # what each call was about


def register() -> None:
    """Have `torch.ops._vllm_fa3_C.fwd` on the CPU, from now on."""
    if not _LIBRARY:
        library = torch.library.Library("_vllm_fa3_C", "DEF")
        library.define(" ".join(SCHEMA.split()))
        library.impl("fwd", forward, "CPU")
        _LIBRARY.append(library)


def forward(
    q,
    k,
    v,
    k_new,
    v_new,
    q_v,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_new,
    seqused_q,
    seqused_k,
    max_seqlen_q,
    max_seqlen_k,
    page_table,
    kv_batch_idx,
    leftpad_k,
    rotary_cos,
    rotary_sin,
    seqlens_rotary,
    q_descale,
    k_descale,
    v_descale,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    is_rotary_interleaved,
    scheduler_metadata,
    num_splits,
    pack_gqa,
    sm_margin,
    s_aux,
    cp_world_size,
    cp_rank,
    cp_tot_seqused_k,
) -> list[Tensor]:
    unused = k_new, v_new, q_v, cu_seqlens_k, cu_seqlens_k_new, kv_batch_idx, rotary_cos, rotary_sin
    unused += seqlens_rotary, q_descale, k_descale, v_descale, scheduler_metadata, s_aux, cp_tot_seqused_k
    assert all(each is None for each in unused) and (window_size_left, window_size_right) == (-1, -1)
    assert (cp_world_size, cp_rank, sm_margin, num_splits) == (1, 0, 0, 1) and pack_gqa is None
    (total_q, num_heads, head_size), (num_pages, page_size, num_heads_k, _) = q.shape, k.shape
    assert q.dtype in (torch.float16, torch.bfloat16) and k.dtype == v.dtype == q.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and v.shape == k.shape
    assert head_size == k.shape[3] <= 256 and head_size % 8 == 0 and num_heads % num_heads_k == 0
    # Keys are copied 16 bytes at once, and descriptors are made for copies of whole boxes.
    for cache in (k, v):
        assert cache.data_ptr() % 16 == 0 and all(
            stride * cache.itemsize % 16 == 0 for stride in cache.stride()[:3]
        )
    batch = len(cu_seqlens_q) - 1
    assert page_table.dtype == torch.int32 and page_table.stride(-1) == 1 and len(page_table) == batch
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.is_contiguous()
    for numbers in (seqused_q, seqused_k, leftpad_k):
        assert numbers is None or numbers.dtype == torch.int32
        assert numbers is None or (numbers.is_contiguous() and numbers.shape == (batch,))
    if out is None:
        out = torch.full((total_q, num_heads, head_size), torch.nan, dtype=q.dtype)
    assert out.dtype == q.dtype and out.stride(-1) == 1 and out.shape == q.shape
    lse = torch.full((num_heads, total_q), torch.nan)
    lens = torch.diff(cu_seqlens_q) if seqused_q is None else seqused_q
    calls.append({"batch": batch, "kv_heads": num_heads_k, "queries": int(lens.sum()), "causal": is_causal})

    for index in range(batch):
        begin, length = int(cu_seqlens_q[index]), int(lens[index])
        if not length:
            continue
        pad = 0 if leftpad_k is None else int(leftpad_k[index])
        count = int(seqused_k[index]) - pad
        assert length <= max_seqlen_q and 0 <= count and int(seqused_k[index]) <= max_seqlen_k
        key = pad + torch.arange(count)
        page = page_table[index, key // page_size].long()
        assert count == 0 or (0 <= int(page.min()) and int(page.max()) < num_pages)
        own_keys, own_values = (
            cache[page, key % page_size].double().repeat_interleave(num_heads // num_heads_k, 1)
            for cache in (k, v)
        )
        queries = q[begin : begin + length].double()
        logits = torch.einsum("qhd,khd->hqk", queries, own_keys) * softmax_scale
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        if is_causal:
            last = torch.arange(length)[:, None] + count - length
            logits = logits.masked_fill(torch.arange(count) > last, -torch.inf)
        own_lse = logits.logsumexp(-1)
        weights = torch.exp(logits - own_lse[..., None]).nan_to_num(0.0)  # rows that see nothing
        out[begin : begin + length] = torch.einsum("hqk,khd->qhd", weights, own_values).to(q.dtype)
        lse[:, begin : begin + length] = own_lse.float()
    return [out, lse, torch.empty(0), torch.empty(0)]
