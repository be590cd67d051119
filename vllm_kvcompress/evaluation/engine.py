"""A vLLM engine in this process, asked the same question under many compression settings."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.host import engine_dtype
from vllm_kvcompress.evaluation.noted import NotedOnce
from vllm_kvcompress.evaluation.variants import EVERY_PROMPT, FULL

_SCRIPT = "kvcompress_script"


class Recorder(Protocol):
    """Sees the logits `[V]`, float32, from which each forced token would have been sampled."""

    def __call__(self, position: int, logits: Tensor) -> None: ...


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: token ids; they are computed, then compacted.
        variant: `FULL`, or what `--kv-compression` would be given.
        forced: tokens the request outputs first, whatever the model says: they are decoded on top of the
            compacted prompt.
        recorder: sees the logits at each forced position.
        max_tokens: free greedy tokens after the forced ones.
        stop: texts that end the free output.
    """

    prompt: Sequence[int]
    variant: str = FULL
    forced: Sequence[int] = ()
    recorder: Recorder | None = None
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        text: the free output.
        kept_fraction: pool blocks it held when it decoded its second token, over those of the full cache.
        compaction_seconds: time its compaction took; 0 for the full cache.
    """

    text: str = ""
    kept_fraction: float = 1.0
    compaction_seconds: float = 0.0


class Engine:
    """Runs requests of different variants side by side in one engine with prefix caching.

    The prompt's raw blocks are computed once; each variant then computes only what its observation window
    needs and compacts a request of its own. Of several requests with a policy that watches every query, or
    has the prompt repeated, the first one has it done for all (see `NotedOnce`), and reads no cached block.
    So what a request keeps does not depend on what was cached.
    """

    def __init__(
        self,
        model: str | Path,
        max_model_len: int,
        block_size: int = 32,
        kv_cache_dtype: str = "auto",
        config: KVCompressionConfig = EVERY_PROMPT,
        **options: Any,
    ) -> None:
        """Start vLLM; with a quantized cache it is stock, and serves the full cache only."""
        self.stock, self._own = kv_cache_dtype != "auto", config
        torch.compiler.set_stance("force_eager")  # or vLLM compiles a sampler for every new batch size
        self.llm = LLM(
            str(model),
            dtype=engine_dtype(),
            max_model_len=max_model_len,
            block_size=block_size,
            max_num_seqs=64,
            enforce_eager=True,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
            logits_processors=[ScriptedTokens],
            kv_cache_dtype=kv_cache_dtype,
            **({} if self.stock else config.engine_kwargs()),
            **options,
        )
        self.tokenizer = self.llm.get_tokenizer()
        self.block_size = block_size
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self._ids = count()
        self._compacted: dict[str, float] = {}  # internal request id -> seconds
        if not self.stock:
            worker = core.model_executor.driver_worker.worker
            self.compactor = worker.compactor
            self._noted = NotedOnce(self.scheduler, worker)
            self._time_compactions()

    @property
    def cache_fraction(self) -> float:
        """Bytes of a cached number over those of the checkpoint's precision; 1 if it is not quantized."""
        if not self.stock:
            return 1.0
        spec, checkpoint = self._group.kv_cache_spec, self.llm.llm_engine.model_config.hf_config
        return spec.dtype.itemsize / checkpoint.dtype.itemsize

    @property
    def token_bytes(self) -> float:
        """Bytes of the cache per token, all layers that attend to all tokens."""
        spec = self._group.kv_cache_spec
        return spec.page_size_bytes * len(self._group.layer_names) / spec.block_size

    @property
    def _group(self) -> KVCacheGroupSpec:
        """The cache group of full attention."""
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        (group,) = [group for group in groups if isinstance(group.kv_cache_spec, FullAttentionSpec)]
        return group

    def run(self, asks: Sequence[Ask]) -> list[Outcome]:
        """Serve requests and return their outcomes in order: all at once, but for those that wait for what
        another one has noted of their prompt.

        Raises:
            KVCompressionError: the model cannot be served as asked.
            RuntimeError: a request was preempted or not compacted as asked; its figures would mean nothing.
        """
        if self.stock:
            return self._run(asks)
        first = self._noted.first_of_each((ask.prompt, self._as_served(ask.variant)) for ask in asks)
        turns = [
            iter(self._run([ask for ask, own in zip(asks, first, strict=True) if own == turn]))
            for turn in (True, False)
        ]
        return [next(turns[not own]) for own in first]

    def _run(self, asks: Sequence[Ask]) -> list[Outcome]:
        engine = self.llm.llm_engine
        outcomes = {str(next(self._ids)): (ask, Outcome()) for ask in asks}
        for name, (ask, _) in outcomes.items():
            params = SamplingParams(
                temperature=0,
                max_tokens=max(1, len(ask.forced) + ask.max_tokens),
                ignore_eos=ask.ignore_eos or not ask.max_tokens,
                output_kind=RequestOutputKind.CUMULATIVE,
                extra_args={**self._compression(ask.variant), _SCRIPT: _Script(ask.forced, ask.recorder)},
            )
            try:
                engine.add_request(name, {"prompt_token_ids": list(ask.prompt)}, params)
            except VLLMValidationError as error:  # the model cannot be served so
                raise KVCompressionError(f"{ask.variant}: {error.args[0]}") from None
        measured: set[str] = set()
        while engine.has_unfinished_requests():
            done = engine.step()
            for request in list(self.scheduler.running):
                name = request.request_id.rpartition("-")[0]  # vLLM adds a suffix to the id it is given
                if request.num_preemptions:
                    raise RuntimeError("a request was preempted: give the engine a larger cache")
                if name in outcomes and name not in measured and request.num_output_tokens >= 2:
                    measured.add(name)
                    raw = -(-request.num_computed_tokens // self._group.kv_cache_spec.block_size)
                    outcome = outcomes[name][1]
                    held = raw if self.stock else self._held(request.request_id)
                    outcome.kept_fraction = held / raw * self.cache_fraction
                    outcome.compaction_seconds = self._compacted.pop(request.request_id, 0.0)
            ended = []
            for output in done:
                ask, outcome = outcomes[output.request_id]
                free = output.outputs[0].token_ids[len(ask.forced) :]
                outcome.text = self.tokenizer.decode(free, skip_special_tokens=True)
                cut = [at for stop in ask.stop if (at := outcome.text.find(stop)) >= 0]
                if cut:
                    outcome.text = outcome.text[: min(cut)]
                    if not output.finished:
                        ended.append(output.request_id)
            if ended:
                engine.abort_request(ended)
        return [outcome for _, outcome in outcomes.values()]

    def compactions(self, prompt: Sequence[int], variant: str) -> Tensor:
        """What share of its tokens every layer and head keeps, `[L, H]`, when this prompt is compacted.

        Raises:
            KVCompressionError: it is not.
        """
        seen: list[Tensor] = []

        def listener(job, counts: Tensor, kept: Tensor) -> None:
            seen.append(counts * kept.shape[1] / job.boundary)

        self.compactor.listeners.append(listener)
        try:
            self.run([Ask(prompt, variant, max_tokens=2, ignore_eos=True)])
        finally:
            self.compactor.listeners.remove(listener)
        if not seen:
            raise KVCompressionError(f"{variant} leaves a prompt of {len(prompt)} tokens as it is")
        return seen[0]

    def step_seconds(self, prompt: Sequence[int], variant: str, batch: int, steps: int) -> float | None:
        """Median seconds of a decode step of `batch` requests with this prompt; None where the first has come
        to the longest context before the last decodes, as each waits for the one before."""
        engine = self.llm.llm_engine
        names = [str(next(self._ids)) for _ in range(batch)]
        for name in names:
            params = SamplingParams(
                temperature=0,
                max_tokens=engine.model_config.max_model_len - len(prompt),
                ignore_eos=True,
                extra_args=self._compression(variant),
            )
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        ended, times = False, []
        while len(times) < steps and not ended:
            running = self.scheduler.running
            decode = len(running) == batch and all(request.num_output_tokens >= 2 for request in running)
            begin = time.perf_counter()
            ended = any(output.finished for output in engine.step())
            if decode:
                times.append(time.perf_counter() - begin)
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        return None if ended else sorted(times)[len(times) // 2]

    def _compression(self, variant: str) -> dict[str, str]:
        if self.stock:
            return {}
        try:
            config = KVCompressionConfig.parse(variant)
        except KVCompressionError:
            return {"kv_compression": variant}  # the engine says what is wrong with it as a request
        if config.matches and "waits" not in config.options:  # else forced tokens are computed on raw context
            variant += ",waits=true" if ":" in variant else ":waits=true"
        return {"kv_compression": variant}

    def _as_served(self, variant: str) -> KVCompressionConfig | None:
        """What a request of a variant is compacted by; None if the engine refuses it."""
        try:
            return self._own.for_request(self._compression(variant)["kv_compression"])
        except KVCompressionError:
            return None

    def _held(self, request_id: str) -> int:
        return self.scheduler.compacting_manager.held_blocks(request_id)

    def _time_compactions(self) -> None:
        run = self.compactor.run

        def timed(works):
            tables = []
            for work in works:  # one by one: each has a time of its own
                begin = time.perf_counter()
                tables += run([work])
                self._compacted[work.job.request_id] = time.perf_counter() - begin
            return tables

        self.compactor.run = timed


@dataclass
class _Script:
    """Forces a request's first tokens."""

    tokens: Sequence[int]
    recorder: Recorder | None = None

    def __deepcopy__(self, memo: dict) -> "_Script":
        return self  # vLLM copies sampling parameters; the recorder must stay the caller's

    def __call__(self, output_ids: list[int], logits: Tensor) -> Tensor:
        position = len(output_ids)
        if position >= len(self.tokens):
            return logits
        if self.recorder is not None:
            self.recorder(position, logits)
        forced = torch.full_like(logits, -torch.inf)
        forced[self.tokens[position]] = 0
        return forced


class ScriptedTokens(AdapterLogitsProcessor):
    """Applies the scripts that requests carry."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> "_Script | None":
        return (params.extra_args or {}).get(_SCRIPT)


@dataclass
class Reference:
    """Remembers the full cache's log-probabilities at each forced position."""

    rows: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, position: int, logits: Tensor) -> None:
        self.rows[position] = logits.float().log_softmax(-1)


@dataclass
class Divergence:
    """Per position: KL divergence to the full cache and surprise at the true token, in nats; whether both say
    the same next token."""

    reference: Reference
    tokens: Sequence[int]
    kl: dict[int, float] = field(default_factory=dict)
    surprise: dict[int, float] = field(default_factory=dict)
    agrees: dict[int, bool] = field(default_factory=dict)

    def __call__(self, position: int, logits: Tensor) -> None:
        ours = logits.float().log_softmax(-1)
        full = self.reference.rows[position]
        self.kl[position] = float(kl_div(ours, full, reduction="sum", log_target=True))
        self.surprise[position] = -float(ours[self.tokens[position]])
        self.agrees[position] = bool(ours.argmax() == full.argmax())
