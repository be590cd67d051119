"""Decode steps of engines stepped by hand, one process each: stock, idle and compressed, alternating."""

import argparse
import contextlib
import cProfile
import multiprocessing
import pstats
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import vllm_kvcompress
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation.host import cache_groups, context_limit, engine_dtype
from vllm_kvcompress.evaluation.variants import behind, max_model_len

PACKAGE = str(Path(vllm_kvcompress.__file__).parent)
BUILT_IN = "~"  # what a profile has for the file of a function that is not Python's


class SteppedEngine:
    """An in-process engine; runs in a process of its own."""

    def __init__(self, variant: str, arguments: argparse.Namespace) -> None:
        import torch
        from vllm import LLM

        torch.compiler.set_stance("force_eager")  # or vLLM compiles a sampler for every new batch size
        self.variant = variant
        self.max_tokens = output_room(arguments)
        longest = longest_steps(arguments)
        config = KVCompressionConfig.parse(arguments.compression)
        blocks = arguments.batch * (longest // arguments.block_size + 1) * cache_groups(arguments.model)
        self.llm = LLM(
            arguments.model,
            dtype=engine_dtype(),
            enforce_eager=True,
            max_model_len=max_model_len(longest, context_limit(arguments.model), [arguments.compression]),
            block_size=arguments.block_size,
            num_gpu_blocks_override=2 * blocks,
            max_num_seqs=max(16, arguments.batch),
            seed=0,
            disable_log_stats=True,
            **({} if variant == "stock" else config.engine_kwargs()),
        )
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        worker = core.model_executor.driver_worker.worker
        builders = [
            group.get_metadata_builder(0) for groups in worker.model_runner.attn_groups for group in groups
        ]
        self.metadata = [_timed(builder, "build") for builder in builders]
        self.compactions = [] if variant == "stock" else _timed(worker.compactor, "run", len)

    def prefill(self, context: int, batch: int) -> dict[str, Any]:
        """Bring `batch` requests to decoding; each prompt goes on where that of a shorter context ended.

        Raises:
            KVCompressionError: the pool is too small for so many at once.
        """
        from vllm import SamplingParams

        self.compactions.clear()
        # With the engine configured, but the request left as it is.
        extra = {"kv_compression": "off"} if self.variant == "idle" else None
        params = SamplingParams(temperature=0, max_tokens=self.max_tokens, ignore_eos=True, extra_args=extra)
        self.names = [f"{context}-{index}" for index in range(batch)]
        for index, name in enumerate(self.names):
            prompt = [(index * 7919 + position * 104729) % 40000 + 100 for position in range(context)]
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        begin = time.perf_counter()
        while len(self.scheduler.running) < batch or any(
            request.num_output_tokens < 3 for request in self.scheduler.running
        ):
            if not self.engine.has_unfinished_requests():
                raise KVCompressionError(
                    f"{batch} requests of {context} tokens do not fit into the pool at once; lower --batch"
                )
            self.engine.step()
        return {"seconds": time.perf_counter() - begin, "compactions": list(self.compactions)}

    def steps(self, count: int) -> tuple[float, float]:
        """Median seconds of a decode step, and of making the attention metadata in it."""
        times = []
        for seconds in self.metadata:
            seconds.clear()
        for _ in range(count):
            begin = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times), sum(
            statistics.median(seconds) for seconds in self.metadata if seconds
        )

    def own_share(self, count: int) -> float:
        """Share of decode steps' time in the package's own functions, and in the built-in ones they call."""
        return own_share(self.engine.step, count)

    def end(self) -> None:
        """Abort the requests."""
        self.engine.abort_request(self.names)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def _timed(owner: Any, method: str, count: Callable[..., int] = lambda *args, **kwargs: 1) -> list[float]:
    """Have every call of an object's method add its seconds, of each thing that it is done to, to a list."""
    seconds: list[float] = []
    call = getattr(owner, method)

    def timed(*args, **kwargs):
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        seconds.append((time.perf_counter() - begin) / count(*args, **kwargs))
        return result

    setattr(owner, method, timed)
    return seconds


def own_share(step: Callable[[], Any], count: int) -> float:
    """Share of the time of some calls that is spent in the package's own functions.

    Engines in different processes differ by more than what an idle plugin takes, for their memory lies
    elsewhere; what a profile finds in one process does not depend on that. (It takes 0.2 µs of each call of
    a function itself.)
    """
    profile = cProfile.Profile()
    with profile:
        for _ in range(count):
            step()
    own = total = 0.0
    of_functions: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, *_), (_, _, seconds, _, callers) in of_functions.items():
        total += seconds
        if file == BUILT_IN:
            own += sum(of_caller[2] for (caller, *_), of_caller in callers.items() if _is_own(caller))
        elif _is_own(file):
            own += seconds
    return own / total


def _is_own(file: str) -> bool:
    return file.startswith(PACKAGE) and file != __file__


def _serve_engine(connection, variant: str, arguments: argparse.Namespace) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the command itself ends this process
    engine = SteppedEngine(variant, arguments)
    connection.send("ready")
    while (call := connection.recv()) is not None:
        name, *given = call
        connection.send(getattr(engine, name)(*given))


@contextlib.contextmanager
def _engines(variants: Sequence[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for variant in variants:
        connections[variant], theirs = context.Pipe()
        process = context.Process(target=_serve_engine, args=(theirs, variant, arguments), daemon=True)
        process.start()
        processes.append(process)
        theirs.close()
    try:
        for variant in variants:
            _receive(connections[variant], variant)
        yield connections
    finally:
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in processes:
            process.join(30 if sys.exception() is None else 1)
            process.kill()


def _receive(connection, variant: str) -> Any:
    try:
        return connection.recv()
    except EOFError:
        raise KVCompressionError(f"the {variant} engine ended; its error is above") from None


def measure_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode step time of stock, idle and compressed at each context length, alternating."""
    from tqdm import tqdm

    variants = ("stock", "idle", "compressed")
    contexts = sorted(arguments.contexts)
    rows = []
    with (
        _engines(variants, arguments) as engines,
        tqdm(total=len(contexts) * (len(variants) + arguments.rounds), desc="decode steps") as bar,
    ):

        def ask(variant: str, *call: Any) -> Any:
            engines[variant].send(call)
            return _receive(engines[variant], variant)

        computed = 0  # tokens of each prompt that are in the prefix cache already
        for context in contexts:
            prefill = {}
            for variant in variants:
                prefill[variant] = ask(variant, "prefill", context, arguments.batch)
                bar.update()
            times: dict[str, list[float]] = {variant: [] for variant in variants}
            metadata: dict[str, list[float]] = {variant: [] for variant in variants}
            for _ in range(arguments.rounds):
                for variant in variants:
                    time.sleep(0.3)  # let the other's OpenMP threads stop spinning
                    step, build = ask(variant, "steps", arguments.steps)
                    times[variant].append(step), metadata[variant].append(build)
                bar.update()
            own = {variant: ask(variant, "own_share", arguments.steps) for variant in variants}
            for variant in variants:
                ask(variant, "end")
            seconds = prefill["stock"]["seconds"] * context / (context - computed) / arguments.batch
            compactions = prefill["compressed"]["compactions"]
            rows.append(
                {
                    "context": context,
                    "step_seconds": {variant: statistics.median(t) for variant, t in times.items()},
                    "metadata_seconds": {variant: statistics.median(t) for variant, t in metadata.items()},
                    "over_stock": {v: ratios(t, times["stock"]) for v, t in times.items() if v != "stock"},
                    "own_share": own,
                    "prefill_seconds": seconds,
                    # With `when=pressure` none: the pool has room for all.
                    "compaction_seconds": statistics.median(compactions) if compactions else 0.0,
                }
            )
            computed = context // arguments.block_size * arguments.block_size
    return {"batch": arguments.batch, "rows": rows}


def longest_steps(arguments: argparse.Namespace) -> int:
    """Tokens that the longest request whose steps are measured may have, or what it needs to be repeated."""
    return max(arguments.contexts) + max(output_room(arguments), behind([arguments.compression]))


def output_room(arguments: argparse.Namespace) -> int:
    """Tokens that requests whose steps are measured may output."""
    return (arguments.rounds + 1) * arguments.steps + 64


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Lowest, median and highest ratio of paired measurements."""
    each = sorted(a / b for a, b in zip(values, base, strict=True))
    return [each[0], statistics.median(each), each[-1]]
