"""What the server tells of compression: in `/metrics` beside vLLM's own, and in its periodic log line."""

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from vllm_kvcompress.log import logger
from vllm_kvcompress.paging.statistics import CARRIER, CompressionStats

COUNTERS = {
    "compactions": "Compactions of requests.",
    "compacted_requests": "Requests that were compacted; once more if preempted since.",
    "freed_blocks": "KV cache blocks that compactions freed, as if no request shared them.",
    "freed_bytes": "Bytes of these blocks, on each worker.",
    "seconds": "Time that compactions took.",
    "prefix_hits": "Requests that went on from a compacted prefix; once more if preempted since.",
    "prefix_hit_tokens": "Prompt tokens that they did not compute.",
}
GAUGES = {
    "kept_fraction": "Blocks that the running requests hold, of those that they would hold uncompressed.",
    "pressure": (
        "How far running requests have come down the ladder of when=pressure: 0 for raw, 1 for its end, "
        "on average."
    ),
    "prefixes": "Compacted prefixes that are kept, with a name or without.",
    "prefix_blocks": "KV cache blocks that hold them.",
}
STATES = "raw", "compacted"
DRAFTS = {
    "drafts": ("draft_tokens", "Drafts of speculative decoding that were tried."),
    "accepted": ("accepted_draft_tokens", "Those of them that were right."),
}


class CompressionMetrics:
    """Prometheus metrics of one front end, named as vLLM's are, by model and engine.

    To be made after vLLM's, which then unregisters all that there were.
    """

    def __init__(self, vllm_config: VllmConfig, engines: list[int]) -> None:
        self._model = vllm_config.model_config.served_model_name
        labels = ["model_name", "engine"]
        self._counters = {
            name: PrometheusStatLogger._counter_cls(f"vllm:kv_compression_{name}", shown, labelnames=labels)
            for name, shown in COUNTERS.items()
        }
        gauges = {
            name: PrometheusStatLogger._gauge_cls(
                f"vllm:kv_compression_{name}", shown, labelnames=labels, multiprocess_mode="mostrecent"
            )
            for name, shown in GAUGES.items()
        }
        self._gauges: Mapping[str, Any] = gauges
        self._requests = PrometheusStatLogger._gauge_cls(
            "vllm:kv_compression_requests",
            "Running requests by whether all of their KV cache is there.",
            labelnames=[*labels, "state"],
            multiprocess_mode="mostrecent",
        )
        self._drafts = {
            what: PrometheusStatLogger._counter_cls(
                f"vllm:kv_compression_{name}", shown, labelnames=[*labels, "state"]
            )
            for what, (name, shown) in DRAFTS.items()
        }
        self._since_log = CompressionStats()
        self._latest: dict[int, CompressionStats] = {}
        for engine in engines:
            self.record(CompressionStats(), engine)

    def take(self, stats: SchedulerStats | None, engine: int) -> None:
        """Note what travels of ours with an engine's own, which are left as vLLM would have them."""
        carried = None if stats is None else stats.kv_connector_stats
        if not carried or CARRIER not in carried:
            return
        assert stats is not None
        own = carried.pop(CARRIER)
        stats.kv_connector_stats = carried or None
        self.record(CompressionStats(**own), engine)

    def record(self, stats: CompressionStats, engine: int) -> None:
        """Note what an engine reports."""
        labels = self._model, str(engine)
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(getattr(stats, name))
        for name, gauge in self._gauges.items():
            gauge.labels(*labels).set(_kept([stats]) if name == "kept_fraction" else getattr(stats, name))
        for state in STATES:
            self._requests.labels(*labels, state).set(getattr(stats, state))
            for what, counter in self._drafts.items():
                counter.labels(*labels, state).inc(getattr(stats, f"{state}_{what}"))
        self._latest[engine] = stats
        self._since_log.compactions += stats.compactions
        self._since_log.seconds += stats.seconds
        self._since_log.freed_blocks += stats.freed_blocks
        self._since_log.prefix_hits += stats.prefix_hits

    def log(self) -> None:
        """A line of compactions and one of prefixes, if there is anything to tell."""
        since, self._since_log = self._since_log, CompressionStats()
        latest = list(self._latest.values())
        compacted = sum(stats.compacted for stats in latest)
        if compacted or since.compactions:
            logger.info(
                "KV compression: %d compactions in %.2f s, %d blocks freed; %d of %d running requests "
                "compacted, all hold %.1f%% of their raw blocks",
                since.compactions,
                since.seconds,
                since.freed_blocks,
                compacted,
                compacted + sum(stats.raw for stats in latest),
                100 * _kept(latest),
            )
        if since.prefix_hits:
            logger.info(
                "KV compression: %d requests went on from %d compacted prefixes of %d blocks",
                since.prefix_hits,
                sum(stats.prefixes for stats in latest),
                sum(stats.prefix_blocks for stats in latest),
            )


def _kept(engines: list[CompressionStats]) -> float:
    """Blocks held of those that there would be; 1 without any."""
    raw = sum(stats.raw_blocks for stats in engines)
    return sum(stats.held_blocks for stats in engines) / raw if raw else 1.0
