"""The GPU backends as vLLM's selection and graph capture see them; no GPU is needed to look."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.attention import chunks
from vllm_kvcompress.attention.flash_attn import CompressedFlashAttentionBackend
from vllm_kvcompress.attention.gpu import (
    CompressedAttentionImpl,
    CompressedMetadataBuilder,
    CompressedTritonAttentionBackend,
    RowArrays,
    RowNumbers,
    ShareLists,
)
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.formats import FORMATS, MATCHED, number_of
from vllm_kvcompress.kernels.batch import Rows
from vllm_kvcompress.kernels.shares import Shares
from vllm_kvcompress.matching import solve_bytes_on
from vllm_kvcompress.paging.layout import PageGrid
from vllm_kvcompress.paging.spec import CompactableSpec
from vllm_kvcompress.plan import STAGED_BYTES
from vllm_kvcompress.policies import POLICIES
from vllm_kvcompress.policies.watching import DEVICE_BLOCK_BYTES
from vllm_kvcompress.worker.gpu import CompressionGPUWorker
from vllm_kvcompress.worker.worker import backend_overrides

PAIRS = [
    (CompressedFlashAttentionBackend, FlashAttentionBackend),
    (CompressedTritonAttentionBackend, TritonAttentionBackend),
]


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_all_but_layout_and_spec_is_the_stock_backends(ours, stock):
    assert ours.get_name() == stock.get_name()
    assert ours.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)
    assert KVCacheLayout.LBHNC in (stock.supported_kv_cache_layouts() or KVCacheLayout)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float16)
    assert isinstance(ours.customize_spec(spec), CompactableSpec)
    # What is not overridden must be the stock class's, not vLLM's base class's.
    for own, base in [
        (ours.get_builder_cls(), stock.get_builder_cls()),
        (ours.get_impl_cls(), stock.get_impl_cls()),
        (ours, stock),
    ]:
        kept = {"__doc__", "__module__", "__abstractmethods__", "_abc_impl", "__parameters__", "__init__"}
        kept |= {"__dict__", "__weakref__", "__annotations__"}
        for name in set(dir(base)) - kept:
            defined = next((vars(cls)[name] for cls in own.__mro__ if name in vars(cls)), None)
            wanted = next((vars(cls)[name] for cls in base.__mro__ if name in vars(cls)), None)
            by_us = any(
                name in vars(cls) for cls in own.__mro__ if cls.__module__.startswith("vllm_kvcompress")
            )
            assert by_us or defined is wanted, name
    assert issubclass(ours.get_builder_cls(), CompressedMetadataBuilder)
    # Else Runner V1 would give a cache group the batch of another one, but for vLLM's own block table.
    assert not ours.get_builder_cls().supports_update_block_table
    assert issubclass(ours.get_impl_cls(), CompressedAttentionImpl)


@pytest.mark.parametrize(
    ("method", "speculates", "of_any_step"),
    [
        ("snapkv", True, True),
        ("snapkv:recompact_every=64", False, True),
        ("h2o", False, True),
        ("criticalkv:base=kv_compress_full", False, True),
        ("h2o", True, False),
        ("expected_attention", False, True),
        ("criticalkv:base=expected_attention", False, True),
        ("expected_attention", True, False),
        ("kvzip", False, False),
    ],
)
def test_full_graphs_of_decoding_alone_where_every_query_is_watched_by_none_of_their_kernels(
    method, speculates, of_any_step, monkeypatch
):
    config = SimpleNamespace(
        additional_config={"kv_compression": method}, speculative_config=object() if speculates else None
    )
    builder, stock = (cls.get_builder_cls() for cls in PAIRS[1])
    support = builder.get_cudagraph_support(config, None)
    of_stock = stock.get_cudagraph_support(config, None)
    assert of_stock == AttentionCGSupport.ALWAYS
    assert support == (of_stock if of_any_step else AttentionCGSupport.UNIFORM_BATCH)
    for less in (AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, AttentionCGSupport.NEVER):
        monkeypatch.setattr(stock, "get_cudagraph_support", lambda *_, less=less: less)
        assert builder.get_cudagraph_support(config, None) == less


def runner_v1():
    """Whether vLLM takes a batch for one of decoding alone, as its runner asks."""
    runner = SimpleNamespace(_is_uniform_decode=GPUModelRunner._is_uniform_decode)

    def decodes(batch, query_len=1):
        runner.input_batch = SimpleNamespace(req_ids=list(batch))
        return runner._is_uniform_decode(
            max_num_scheduled_tokens=max(batch.values()),
            uniform_decode_query_len=query_len,
            num_tokens=sum(batch.values()),
            num_reqs=len(batch),
            force_uniform_decode=None,
        )

    return runner, decodes


def runner_v2():
    def gather(scheduler_output, dummy_run):
        (count, *others) = set(scheduler_output.num_scheduled_tokens.values())
        return "its state", None if others else count

    runner = SimpleNamespace(gather_batch_req_state=gather)

    def decodes(batch, query_len=1):
        state, count = runner.gather_batch_req_state(SimpleNamespace(num_scheduled_tokens=batch), False)
        assert state == "its state"
        return count == query_len

    return runner, decodes


@pytest.mark.parametrize("make", [runner_v1, runner_v2])
def test_a_step_is_kept_out_of_full_graphs_if_and_only_if_spans_note_something_of_it(make):
    runner, decodes = make()
    noted = {"a"}
    state = SimpleNamespace(
        live=True, observer=SimpleNamespace(notes=lambda request_ids: not noted.isdisjoint(request_ids))
    )
    worker = SimpleNamespace(model_runner=runner, compression=state, use_v2_model_runner=make is runner_v2)
    CompressionGPUWorker._keep_noted_steps_out_of_full_graphs(worker)
    assert decodes({"b": 1, "c": 1}) and decodes({"b": 4, "c": 4}, query_len=4)
    assert not decodes({"b": 1, "a": 1}) and not decodes({"a": 4, "c": 4}, query_len=4)
    assert not decodes({"b": 1, "c": 3})
    noted.clear()
    assert decodes({"b": 1, "a": 1})
    noted.add("a")
    state.live = False  # batches of vLLM's own making
    assert decodes({"b": 1, "a": 1})


def test_lengths_are_waited_for_only_where_drafts_leave_them_open():
    on_device, on_host = torch.tensor([5, 9]), torch.tensor([5, 10])
    builder = object.__new__(CompressedTritonAttentionBackend.get_builder_cls())

    def lengths(known, drafts=None):
        builder.vllm_config = SimpleNamespace(speculative_config=drafts)
        common = SimpleNamespace(seq_lens=on_device, seq_lens_cpu_upper_bound=known)
        return builder._lengths(common).tolist()

    assert lengths(on_host) == [5, 10]
    assert lengths(on_host, drafts="ngram") == lengths(None) == [5, 9]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("mm_prefix", [False, True])
def test_whatever_vllm_would_choose_on_cuda_is_ours_or_passed_over(capability, mm_prefix, monkeypatch):
    for absent in ("vllm._C_stable_libtorch", "vllm._C"):  # the CPU build has no CUDA operators
        monkeypatch.setitem(sys.modules, absent, ModuleType(absent))
    from vllm.platforms.cuda import _get_backend_priorities

    priorities = _get_backend_priorities(False, DeviceCapability(*capability), use_mm_prefix=mm_prefix)
    others = set(priorities) - set(CompressionGPUWorker.backends)
    assert others <= {AttentionBackendEnum.TURBOQUANT}  # its quantized cache is refused
    assert {AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN} <= set(priorities)


def test_the_gpu_worker_leaves_torch_as_it_is():
    """vLLM's CPU worker replaces streams, events and memory queries of torch when it is imported."""
    code = "import sys, vllm_kvcompress.worker.gpu; print('vllm.v1.worker.cpu.shm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_the_cpu_worker_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import vllm_kvcompress.worker.cpu"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_another_backend_says_in_one_line_what_to_choose():
    with backend_overrides(CompressionGPUWorker.backends):
        (reason,) = AttentionBackendEnum.FLASHINFER.get_class().validate_configuration(head_size=64)
        assert AttentionBackendEnum.FLASH_ATTN.get_class() is CompressedFlashAttentionBackend
    assert "FLASH_ATTN and TRITON_ATTN" in reason and "\n" not in reason
    assert AttentionBackendEnum.FLASH_ATTN.get_class() is FlashAttentionBackend


def test_rows_are_sent_only_when_they_change_and_always_to_the_same_place():
    arrays = RowArrays(4, torch.device("cpu"))
    place = arrays.slot.data_ptr()
    arrays.show([RowNumbers(2, 10, 5), RowNumbers(added=1, moments=90, skip=4)])
    assert arrays.slot.tolist() == [2, -1, -1, -1] and arrays.capacity.tolist() == [5, 0, 0, 0]
    assert arrays.moments.tolist() == [0, 90, 0, 0] and arrays.skip.tolist() == [0, 4, 0, 0]
    arrays.slot[0] = 7  # to see whether it is written again
    arrays.show([RowNumbers(2, 10, 5), RowNumbers(added=1, moments=90, skip=4)])
    assert arrays.slot[0] == 7 and arrays.added.tolist() == [0, 1, 0, 0]
    arrays.show([RowNumbers(3, 10, 5)])
    assert arrays.slot.tolist() == [3, -1, -1, -1] and arrays.ring.tolist() == [10, 0, 0, 0]
    assert not arrays.added.any()
    assert arrays.slot.data_ptr() == place


def test_shares_are_listed_of_what_is_there_and_once_more_when_it_is_gone(monkeypatch):
    """A captured graph reads the lists in every step, and must find nothing there of a step before."""
    listed = []
    monkeypatch.setattr(Shares, "cut", lambda self, runs, rows, size, number: listed.append(number))
    lists = ShareLists(PageGrid(2, 10, 2, 16), 4, 1024, 8, torch.device("cpu"))
    kivi = FORMATS["kivi4"]

    def step(held, max_query_len=1):
        del listed[:]
        rows = Rows(*[torch.zeros(1, dtype=torch.int32)] * 4, max_query_len)
        lists.update(None, rows, held)
        return sorted(listed)

    raw = lists.of(None)
    assert step(set()) == []
    assert step({None, kivi}) == [0, number_of(kivi)]
    assert step({None}, max_query_len=500) == [], "other programs serve rows that long"
    assert step({None}) == [0, number_of(kivi)], "the second list is emptied"
    assert step({FORMATS["auto"]}) == [0], "of several parts there is no list"
    assert step(set()) == []
    assert lists.of(None) is raw, "in place"


def test_memory_for_lists_and_for_what_is_merged_is_set_aside(monkeypatch):
    """More of it where more rows are served, and where sinks have every batch merged."""
    free = 10 * 2**30
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: free)

    def available(
        max_num_seqs=64, sinks=None, method="snapkv", cache_dtype="auto", speculates=False, kinds=(int, int)
    ):
        worker = object.__new__(CompressionGPUWorker)
        worker.device = torch.device("cpu")
        model = dict(get_num_layers=2, get_num_kv_heads=8, get_num_attention_heads=32, get_head_size=64)
        worker.model_config = SimpleNamespace(
            max_model_len=4096,
            dtype=torch.bfloat16,
            **{name: lambda *_, value=value: value for name, value in model.items()},
        )
        worker.parallel_config = None
        worker.scheduler_config = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192)
        worker.compilation_config = SimpleNamespace(max_cudagraph_capture_size=None)
        worker.cache_config = SimpleNamespace(
            kv_cache_memory_bytes=None, block_size=16, cache_dtype=cache_dtype
        )
        worker.vllm_config = SimpleNamespace(
            additional_config={"kv_compression": method}, speculative_config="ngram" if speculates else None
        )
        impl = SimpleNamespace(sinks=sinks, kv_cache_dtype=cache_dtype, vllm_flash_attn_version=3)
        layer = SimpleNamespace(impl=impl)
        monkeypatch.setattr(CompressionGPUWorker, "compacted_layers", lambda self: [layer, layer])
        specs = {str(index): kind() for index, kind in enumerate(kinds)}
        monkeypatch.setattr(CompressionGPUWorker, "get_kv_cache_spec", lambda self: specs)
        return worker.determine_available_memory()

    assert available() < free
    lists = Shares.num_bytes(64, 2, 8, 1), Shares.num_bytes(1024, 2, 8, 1)
    assert available() - available(1024) > 2 * (lists[1] - lists[0]) > 0
    assert available() - available(sinks=torch.zeros(32)) > 2 * 8192 * 32 * 64 * 4
    # Beside one layer of another kind each is in a group of its own, and twice the blocks may stay.
    assert available() - available(kinds=(int, int, str)) == 4 * 64 * 4096 // 16
    # Every token of a head has a sum of four bytes beside its keys and values, of 256 or 128.
    for cache_dtype, token in (("auto", 256), ("fp8", 128)):
        for method in ("h2o", "criticalkv:base=kv_compress_full"):
            less = available(method=method, cache_dtype=cache_dtype)
            plain = available(method="knorm", cache_dtype=cache_dtype)
            assert less == pytest.approx(plain * token / (token + 4), rel=1e-3)
    # Moments of every query head, 2 parts of 34 rows: of 32 prompts, where else 64 queries of each are set
    # aside; what scoring one of them takes; and those of a layer and of 16 parts of a batch, to be merged.
    moments = 2 * 32 * 2 * 34 * 64 * 4
    less = available(method="knorm") - available(method="expected_attention")
    assert less == 32 * (moments - 64 * 2 * 32 * 64 * 2) + 4 * 4 * 2 * 32 * 64**2 + 16 * moments // 2
    # Where PyTorch watches, some queries' attention: no more than what compacting takes before.
    for method in ("h2o", "kvzip"):
        assert available(method="knorm") == available(method=method, speculates=True)
    assert 4 * DEVICE_BLOCK_BYTES <= STAGED_BYTES
    # What is noted of one context, for each of its tokens the query that paid most to it, is on top of that;
    # and what is solved of it, and of another one that waits for room; and what solving takes.
    for method, record in (("attention_matching", "k4v3"), ("attention_matching+k8v4", "k8v4")):
        less = available(method="knorm") - available(method=method)
        noted, solved = 4096 * (64 * 2 + 17) + 2048 * 64 * 2, 4096 // 32 * MATCHED[record].record_bytes(64)
        most = max(solve_bytes_on("cpu"), POLICIES["attention_matching"]().most_fit_bytes(4096, 64, "cpu"))
        assert less == 2 * 8 * (noted + 2 * solved) + most
    free = (free - available(method="attention_matching")) // 2
    with pytest.raises(KVCompressionError, match=r"matching sets aside 0\.\d GiB .*--max-model-len") as e:
        available(method="attention_matching")
    assert "\n" not in str(e.value)
    free = 10 * 2**30
    # Where FlashAttention 3 serves chunks, their queries once more and what is found in the runs.
    plain = available(), available(cache_dtype="fp8")
    monkeypatch.setenv(chunks.VARIABLE, "1")
    monkeypatch.setattr(chunks, "is_missing", lambda device: None)
    assert plain[0] - available() == 8192 * 32 * (2 * 64 * 2 + 2 * 4)
    assert plain[1] == available(cache_dtype="fp8")
