"""The `vllm.general_plugins` entry point: what of vLLM is wrapped wherever the plugin is installed.

vLLM calls `register` in every process before any configuration exists. It adds the command-line flag and
looks at each engine configuration; one that does not ask for compression is handed back untouched.
"""

import argparse
import functools
import json
from dataclasses import dataclass, field
from typing import Any

import msgspec
import vllm.plugins
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreReadyResponse, EngineCoreRequest
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_kvcompress import profiles, scorers
from vllm_kvcompress.config import AUTO, KVCompressionConfig, KVCompressionError
from vllm_kvcompress.log import logger
from vllm_kvcompress.paging.groups import GROUP, block_size, blocks_beside, num_groups
from vllm_kvcompress.paging.repetition import LEAST, longest_repetition
from vllm_kvcompress.plan import is_ever_compacted, peak_blocks
from vllm_kvcompress.support import (
    LACKS,
    check_method,
    check_supported,
    check_watched,
    encoded_tokens,
)

KEY = "kv_compression"
_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_kvcompress.worker.cpu.CompressionCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_kvcompress.worker.gpu.CompressionGPUWorker",
}


def register() -> None:
    """Install the shim; calling it again does nothing."""
    if getattr(EngineArgs, "_kv_compression", False):
        return
    EngineArgs._kv_compression = True
    EngineArgs.add_cli_args = staticmethod(_with_flag(EngineArgs.add_cli_args))
    EngineArgs.from_cli_args = classmethod(_with_flag_value(EngineArgs.from_cli_args.__func__))
    EngineArgs.create_engine_config = _with_compression(EngineArgs.create_engine_config)
    InputProcessor._validate_params = _with_request_check(InputProcessor._validate_params)
    InputProcessor.process_inputs = _with_length_check(InputProcessor.process_inputs)
    EngineCore._initialize_kv_caches = _with_lacks(EngineCore._initialize_kv_caches)
    EngineCoreProc._make_ready_response = _with_lacks_sent(EngineCoreProc._make_ready_response)
    MPClient._apply_ready_response = _with_lacks_received(MPClient._apply_ready_response)
    StatLoggerManager.__init__ = _with_metrics(StatLoggerManager.__init__)
    StatLoggerManager.record = _with_metrics_recorded(StatLoggerManager.record)
    StatLoggerManager.log = _with_metrics_logged(StatLoggerManager.log)
    InputProcessor.__init__ = _with_watched_endpoints(InputProcessor.__init__)
    EngineCore.kv_compression_state = _state
    EngineCore.kv_compression_heads = _heads
    EngineCore.kv_compression_save_prefix = _save_prefix
    EngineCore.kv_compression_prefix_saved = _prefix_saved
    EngineCore.kv_compression_load_prefix = _load_prefix
    EngineCore.__init__ = _with_saved_prefixes(EngineCore.__init__)
    for core in (EngineCoreProc, DPEngineCoreProc):
        core.run_busy_loop = _with_saved_prefixes(core.run_busy_loop)
    EngineCore.kv_compression_prefixes = _prefixes
    EngineCore.kv_compression_delete_prefix = _delete_prefix
    vllm.plugins.load_endpoint_plugins = _with_page(vllm.plugins.load_endpoint_plugins)


def _with_flag(add_cli_args):
    @functools.wraps(add_cli_args)
    def wrapped(parser):
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            title="KVCompression", description="Per-head KV cache compression (vllm-kvcompress)."
        )
        group.add_argument(
            "--kv-compression",
            action=_FlagAction,
            default=None,
            metavar="METHOD[:OPTION=VALUE,...]|JSON",
            help="Prune the KV cache per attention head and return the freed blocks to the scheduler, e.g. "
            '\'snapkv:budget=0.25\' or \'{"method": "kv_compress", "budget": 0.125}\'. '
            "`vllm-kvcompress methods` lists methods and options.",
        )
        return parser

    return wrapped


class _FlagAction(argparse.Action):
    """Reads any form of the flag; refuses options after an earlier value, which they would replace.

    vLLM's parser moves dotted options behind all other arguments, as one JSON object.
    """

    def __call__(self, parser, namespace, value, option_string=None):
        if value.lstrip().startswith("{") and getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(
                self,
                "dotted or JSON options cannot be added to an earlier value; "
                "give method and options in one form, e.g. METHOD:OPTION=VALUE",
            )
        try:
            setattr(namespace, self.dest, KVCompressionConfig.parse(value).to_dict())
        except KVCompressionError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def _with_flag_value(from_cli_args):
    @functools.wraps(from_cli_args)
    def wrapped(cls, args):
        engine_args = from_cli_args(cls, args)
        value = getattr(args, KEY, None)
        if value is not None:
            engine_args.additional_config = {**(engine_args.additional_config or {}), KEY: value}
            # Of several API servers each reads these arguments again in a process of its own, where plugins
            # are loaded while it does.
            args.additional_config = engine_args.additional_config
        return engine_args

    return wrapped


def _with_compression(create_engine_config):
    @functools.wraps(create_engine_config)
    def wrapped(self, *args, **kwargs):
        return configure(create_engine_config(self, *args, **kwargs))

    return wrapped


def configure(vllm_config: VllmConfig) -> VllmConfig:
    """Select our scheduler and worker if the configuration asks for compression.

    Raises:
        KVCompressionError: an option is wrong, or the engine uses an unsupported feature.
    """
    requested = _requested(vllm_config)
    if requested is None:
        return vllm_config
    config = KVCompressionConfig.parse(requested)
    if config.prefix is not None:
        raise KVCompressionError(
            "kv-compression: prefix names what one request's prompt is compacted to; leave it out of the "
            "engine's options and give it to requests"
        )
    if not config.enabled:  # "off" is the same as not asking
        return vllm_config
    check_supported(vllm_config)
    config = _with_scorer(config, vllm_config)
    check_method(config, vllm_config)
    scheduler_config, parallel_config = vllm_config.scheduler_config, vllm_config.parallel_config
    if scheduler_config.scheduler_cls is not None or parallel_config.worker_cls not in _WORKERS:
        raise KVCompressionError(
            "kv-compression brings its own scheduler and worker class; "
            "remove --scheduler-cls and --worker-cls, or --kv-compression"
        )
    vllm_config.additional_config[KEY] = config.to_dict()
    kind = "AsyncCompressionScheduler" if scheduler_config.async_scheduling else "CompressionScheduler"
    scheduler_config.scheduler_cls = f"vllm_kvcompress.paging.scheduler.{kind}"
    parallel_config.worker_cls = _WORKERS[parallel_config.worker_cls]
    return vllm_config


def _with_scorer(config: KVCompressionConfig, vllm_config: VllmConfig) -> KVCompressionConfig:
    """With the scorer that is found for the model, if the user named none."""
    if config.scorer is None:
        model = vllm_config.model_config
        found = scorers.find(model.model)
        try:
            serves = found is not None and scorers.load(found).serves(model.hf_text_config)
        except ValueError as error:
            raise KVCompressionError(
                f"kv-compression: {error}; remove it or train the scorer again"
            ) from None
        if serves:
            config = KVCompressionConfig.parse(config.to_dict() | {"scorer": found})
    if config.method == AUTO:
        chosen = f"foresight with the scorer {config.scorer}"
        if config.scorer is None:
            chosen = (
                f"{config.auto_without_scorer}; `vllm-kvcompress calibrate MODEL --scorer` trains a scorer"
            )
        logger.info("kv-compression: auto chose %s", chosen)
    return config


def _requested(vllm_config: VllmConfig) -> str | dict | None:
    additional = vllm_config.additional_config
    return additional.get(KEY) if isinstance(additional, dict) else None


# What policies need of a model is known when the workers have built it, and requests are checked in the
# front end. So it goes with what else the engine tells each front end when it is ready.


@dataclass
class _ReadyResponse(EngineCoreReadyResponse):
    """vLLM's, whose own readers pass over this field."""

    kv_compression_lacks: dict[str, str] = field(default_factory=dict)
    kv_compression_group: dict[str, int] = field(default_factory=dict)


class _Lacks(msgspec.Struct):
    kv_compression_lacks: dict[str, str] = {}
    kv_compression_group: dict[str, int] = {}


def _with_lacks(initialize_kv_caches):
    @functools.wraps(initialize_kv_caches)
    def wrapped(self, vllm_config):
        kv_cache_config = initialize_kv_caches(self, vllm_config)
        if _compresses(vllm_config):
            for lacks in self.collective_rpc("kv_compression_lacks"):
                _note_lacks(vllm_config, lacks)
            vllm_config.additional_config[GROUP] = _group(kv_cache_config, vllm_config)
            if not isinstance(self, EngineCoreProc):  # else the front end says so
                check_method(KVCompressionConfig.parse(_requested(vllm_config)), vllm_config)
        return kv_cache_config

    return wrapped


def _with_lacks_sent(make_ready_response):
    @functools.wraps(make_ready_response)
    def wrapped(self):
        response = make_ready_response(self)
        if not _compresses(self.vllm_config):
            return response
        additional = self.vllm_config.additional_config
        return _ReadyResponse(
            **vars(response),
            kv_compression_lacks=additional[LACKS],
            kv_compression_group=additional[GROUP],
        )

    return wrapped


def _with_lacks_received(apply_ready_response):
    @functools.wraps(apply_ready_response)
    def wrapped(self, payload):
        apply_ready_response(self, payload)
        if payload and _compresses(self.vllm_config):
            found = msgspec.msgpack.decode(payload, type=_Lacks)
            _note_lacks(self.vllm_config, found.kv_compression_lacks)
            self.vllm_config.additional_config[GROUP] = found.kv_compression_group
            check_method(KVCompressionConfig.parse(_requested(self.vllm_config)), self.vllm_config)

    return wrapped


def _group(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> dict[str, int]:
    """What a front end must know of the compacted groups, where there are others; see `paging.groups`."""
    # The second registers a spec where it is imported.
    from vllm.model_executor.models.utils import extract_layer_index

    from vllm_kvcompress.paging.spec import compactable_groups

    own = compactable_groups(kv_cache_config)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    compacted = specs[own[0]]
    if len(specs) == 1 and compacted.kernel_block_size is None:
        return {}
    beside = sum(
        -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
        for index, spec in enumerate(specs)
        if index not in own
    )
    found = {"block_size": compacted.block_size, "beside": beside, "groups": len(own)}
    found["tokens_of_page"], found["heads"] = compacted.tokens_of_page, compacted.num_kv_heads
    total = vllm_config.model_config.get_total_num_hidden_layers()  # behind which a draft model's are
    names = [name for index in own for name in kv_cache_config.kv_cache_groups[index].layer_names]
    found["layers"] = sum(extract_layer_index(name) < total for name in names)
    return found | ({"states": 1} if kv_cache_config.has_mamba_layers else {})


def _note_lacks(vllm_config: VllmConfig, lacks: dict[str, str]) -> None:
    """Add what one worker or engine found; what one rank lacks, the model lacks."""
    known = vllm_config.additional_config.setdefault(LACKS, {})
    for need, reason in lacks.items():
        known.setdefault(need, reason)


def _compresses(vllm_config: VllmConfig) -> bool:
    requested = _requested(vllm_config)
    return requested is not None and KVCompressionConfig.parse(requested).enabled


def _with_request_check(validate_params):
    @functools.wraps(validate_params)
    def wrapped(self, params, *args, **kwargs):
        # Checked where vLLM checks requests, so that a bad option is the client's error (HTTP 400) and
        # never reaches the scheduler.
        if isinstance(params, SamplingParams) and params.extra_args and KEY in params.extra_args:
            _check_request(self.vllm_config, params.extra_args[KEY])
        return validate_params(self, params, *args, **kwargs)

    return wrapped


def _check_request(vllm_config: VllmConfig, value: object) -> None:
    requested = _requested(vllm_config)
    try:
        engine = KVCompressionConfig.parse("off" if requested is None else requested)
        if not engine.enabled:
            raise KVCompressionError(
                "kv_compression was given for a request, but this server runs without it; "
                "start it with --kv-compression"
            )
        if not isinstance(value, str | dict):
            raise KVCompressionError(
                f"kv_compression must be a string or a dictionary, got {json.dumps(value)}"
            )
        # Before the file is looked at, for a client should not learn what is on the server's disk.
        profile, scorer = KVCompressionConfig.named_files(value)
        if profile and f"profile:{profile}" != engine.allocation and profile not in profiles.included():
            raise KVCompressionError(
                "a request may use the server's own head profile or a packaged one; "
                f"start the server with allocation=profile:{profile}"
            )
        if scorer and scorer not in (engine.scorer, *scorers.included()):
            raise KVCompressionError(
                "a request may use the server's own scorer or a packaged one; "
                f"start the server with scorer={scorer}"
            )
        config = engine.for_request(value)
        if config.prefix is not None and not config.enabled:
            raise KVCompressionError("nothing is compacted with off; leave prefix out, or name a method")
        check_method(config, vllm_config)
        check_watched(config, engine, vllm_config)
    except KVCompressionError as error:
        raise VLLMValidationError(str(error), parameter=KEY) from None


def _with_length_check(process_inputs):
    @functools.wraps(process_inputs)
    def wrapped(self, *args, **kwargs):
        request = process_inputs(self, *args, **kwargs)
        if isinstance(self.vllm_config.scheduler_config.scheduler_cls, str) and request.sampling_params:
            _check_length(self.vllm_config, request)
            _check_prompt_logprobs(self.vllm_config, request)
            _check_prefix(self.vllm_config, request)
        return request

    return wrapped


def blocks_of_an_engine(vllm_config: VllmConfig) -> int:
    """Blocks of one engine core's pool, as a front end knows them; 0 before it does.

    A front end sums those of all cores that it talks to. A core's own configuration has its own number.
    """
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_rank_local is not None:  # one of several programs, each with a core of its own
        engines = 1
    elif parallel.local_engines_only:
        engines = parallel.data_parallel_size_local
    else:
        engines = parallel.data_parallel_size
    return (vllm_config.cache_config.num_gpu_blocks or 0) // engines


def _check_length(vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Refuse a request that could not be served in this pool, or not with the method it asks for."""
    requested = _requested(vllm_config)
    if requested is None:
        return
    params, longest = request.sampling_params, vllm_config.model_config.max_model_len
    engine = KVCompressionConfig.parse(requested)
    config = engine.for_request((params.extra_args or {}).get(KEY))
    prompt = request.prompt_token_ids
    problem = None
    embedded = request.prompt_embeds is not None  # whole or in part, where the ids are placeholders
    num_prompt = length_from_prompt_token_ids_or_embeds(prompt, request.prompt_embeds)
    num_blocks = blocks_of_an_engine(vllm_config)
    if config.enabled and config.repeats and (prompt is None or embedded or request.mm_features):
        problem = f"{config.method} repeats the prompt, which must be text; use another method"
    elif (
        config.enabled and config.repeats and longest_repetition(vllm_config, num_prompt, num_blocks) < LEAST
    ):
        problem = (
            f"{config.method} needs {LEAST} tokens behind the prompt of {num_prompt}, more than "
            "--max-model-len and the KV cache leave; raise them or use another method"
        )
    elif engine.when == "streaming":
        # The pool may be smaller than a request that keeps everything.
        num_tokens = min(num_prompt + (params.max_tokens or longest), longest)
        beside = not current_platform.is_cpu()
        in_page = encoded_tokens(config, vllm_config)
        needed = peak_blocks(config, num_prompt, num_tokens, block_size(vllm_config), beside, in_page)
        needed = needed * num_groups(vllm_config) + blocks_beside(vllm_config)
        usable = num_blocks - 1
        if needed > usable > 0:
            problem = (
                f"{num_tokens} tokens need {needed} blocks of the pool's {usable} with "
                "these options; lower max_tokens, or keep when=streaming"
            )
    if problem:
        raise VLLMValidationError(f"kv_compression: {problem}", parameter=KEY)


def _check_prompt_logprobs(vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Refuse log-probabilities of a prompt whose later tokens would read compacted context."""
    params, requested = request.sampling_params, _requested(vllm_config)
    if requested is None or (params.prompt_logprobs is None and params.prompt_logprob_token_ids is None):
        return
    config = KVCompressionConfig.parse(requested).for_request((params.extra_args or {}).get(KEY))
    length = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    # With one token of output only its prompt may be compacted, while it is computed.
    in_page = encoded_tokens(config, vllm_config)
    compacted = is_ever_compacted(config, length, length + 1, block_size(vllm_config), in_page)
    if config.enabled and (compacted and config.when == "streaming" or request.resumable):
        how = "a prompt that goes on later" if request.resumable else "when=streaming"
        raise VLLMValidationError(
            f"kv_compression: with {how}, prompt_logprobs (and echo) would be those of compacted context; "
            'leave them out, or send vllm_xargs {"kv_compression": "off"}',
            parameter=KEY,
        )


def _check_prefix(vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Refuse a name for what a request cannot leave behind."""
    params, requested = request.sampling_params, _requested(vllm_config)
    given = (params.extra_args or {}).get(KEY)
    if requested is None or given is None:
        return
    if KVCompressionConfig.parse(requested).for_request(given).prefix is None:
        return
    longest = vllm_config.model_config.max_model_len
    length = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    problem = None
    if request.resumable:
        problem = "a prompt that goes on later stays raw; leave prefix out"
    elif params.n > 1:
        problem = f"one request leaves one prefix of its name, got n={params.n}; use n=1"
    elif length + 2 > longest:
        problem = (
            "a prompt is compacted after its first token of output; with prefix it may have no more than "
            f"{longest - 2} tokens with --max-model-len {longest}, got {length}"
        )
    elif params.max_tokens == 1:
        problem = (
            "a prompt is compacted after the first token of output; with prefix use max_tokens=2 or more"
        )
    if problem:
        raise VLLMValidationError(f"kv_compression: {problem}", parameter=KEY)


def _with_metrics(init):
    @functools.wraps(init)
    def wrapped(self, vllm_config, engine_idxs=None, *args, **kwargs):
        init(self, vllm_config, engine_idxs, *args, **kwargs)
        self.kv_compression = None
        if _compresses(vllm_config):
            from vllm_kvcompress.metrics import CompressionMetrics

            self.kv_compression = CompressionMetrics(vllm_config, self.engine_indexes)

    return wrapped


def _with_metrics_recorded(record):
    @functools.wraps(record)
    def wrapped(self, scheduler_stats, *args, engine_idx=None, **kwargs):
        if self.kv_compression is not None:
            self.kv_compression.take(scheduler_stats, engine_idx or 0)
        return record(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)

    return wrapped


def _with_metrics_logged(log):
    @functools.wraps(log)
    def wrapped(self):
        log(self)
        if self.kv_compression is not None:
            self.kv_compression.log()

    return wrapped


# What an operator may look at. vLLM's own entry points for endpoints must be named in VLLM_PLUGINS, and warn
# in every server that does not; this page is there wherever compression is.


def _state(self) -> dict[str, Any]:
    """A method of `EngineCore`: how things stand."""
    return self.scheduler.compression_state().to_dict()


def _heads(self, shown_id: str) -> dict[str, Any] | None:
    """A method of `EngineCore`: what each head keeps of a request; None unless it runs and is compacted."""
    request_id = self.scheduler.compacted_request(shown_id)
    if request_id is None:
        return None
    told = self.collective_rpc("kv_compression_heads", args=(request_id,))
    ranks = [rank for rank in told if rank is not None]  # one of each pipeline stage
    if not ranks:  # not compacted yet
        return None
    return {
        "request": shown_id,
        "layers": [layer for rank in ranks for layer in rank["layers"]],
        "pages": [pages for rank in ranks for pages in rank["pages"]],
        "raw_pages": ranks[0]["raw_pages"],
    }


def _save_prefix(self, ticket: str, name: str, salt: str | None = None, path: str | None = None) -> None:
    """A method of `EngineCore`; see `prefix_files.Saves.begin`."""
    from vllm_kvcompress import prefix_files

    prefix_files.saves_of(self).begin(ticket, name, salt, path)


def _prefix_saved(self, ticket: str) -> tuple[bool, str | None]:
    """A method of `EngineCore`; see `prefix_files.Saves.outcome`."""
    from vllm_kvcompress import prefix_files

    return prefix_files.saves_of(self).outcome(ticket)


def _load_prefix(self, path: str) -> str | None:
    """A method of `EngineCore`; see `prefix_files.load`."""
    from vllm_kvcompress import prefix_files

    return prefix_files.load(self, path)


def _with_saved_prefixes(begin):
    """What ends a core's start, or begins its work in a process of its own: there vLLM loads plugins when
    the core is being made already."""
    ends_start = begin.__name__ == "__init__"

    @functools.wraps(begin)
    def wrapped(self, *args, **kwargs):
        if ends_start:
            begin(self, *args, **kwargs)
        if ends_start != isinstance(self, EngineCoreProc) and _compresses(self.vllm_config):
            from vllm_kvcompress import prefix_files

            prefix_files.load_folder(self)
        return None if ends_start else begin(self, *args, **kwargs)

    return wrapped


def _prefixes(self, salt: str | None) -> list[dict[str, Any]]:
    """A method of `EngineCore`: the compacted prefixes under a salt."""
    return [prefix.to_dict() for prefix in self.scheduler.prefixes(salt)]


def _delete_prefix(self, name: str, salt: str | None) -> bool:
    """A method of `EngineCore`: keep a compacted prefix no longer; False if there is none of this name."""
    if self.scheduler.compression.prefix_folder:
        from vllm_kvcompress import prefix_files

        prefix_files.remove(self, name, salt)
    return self.scheduler.delete_prefix(name, salt)


def _with_page(load_endpoint_plugins):
    @functools.wraps(load_endpoint_plugins)
    def wrapped(*args, **kwargs):
        return [*load_endpoint_plugins(*args, **kwargs), _PagePlugin()]

    return wrapped


class _PagePlugin:
    """An endpoint plugin, as vLLM has them."""

    name = KEY
    required_tasks = ("generate",)

    def attach_router(self, app) -> None:
        self._app = app  # whether anything is shown is known when the engine is

    async def init_state(self, engine_client, state, args) -> None:
        if engine_client is None or not _compresses(engine_client.vllm_config):
            return
        from vllm_kvcompress.page import Page
        from vllm_kvcompress.prefix_endpoints import PrefixEndpoints

        config = KVCompressionConfig.parse(_requested(engine_client.vllm_config))
        keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        model = engine_client.vllm_config.model_config.served_model_name
        self._app.include_router(Page(engine_client.engine_core, config, model, keys).router)
        tokenization = state.serving_tokenization
        self._app.include_router(PrefixEndpoints(engine_client, tokenization, keys).router)


def _with_watched_endpoints(init):
    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        # Where requests enter a process. Only here, for other processes need none of what a server imports.
        from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
        from vllm.entrypoints.serve.engine.serving import BaseServing

        for serving in (BaseServing, PoolingBaseServing):
            if not hasattr(serving._check_model, "__wrapped__"):
                serving._check_model = _with_endpoint_check(serving._check_model)
        init(self, *args, **kwargs)

    return wrapped


def _with_endpoint_check(check_model):
    @functools.wraps(check_model)
    async def wrapped(self, request):
        _check_endpoint(request)
        return await check_model(self, request)

    return wrapped


def _check_endpoint(request: Any) -> None:
    """Refuse an option in an HTTP request that vLLM would drop before it makes sampling parameters."""
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest

    problem, xargs = None, getattr(request, "vllm_xargs", None)
    if KEY in (getattr(request, "model_extra", None) or {}):
        problem = 'kv_compression is an option of vllm_xargs; send "vllm_xargs": {"kv_compression": …}'
    elif not isinstance(xargs, dict) or KEY not in xargs:
        return
    elif getattr(request, "use_beam_search", False):
        problem = "kv_compression cannot be chosen for beam search, whose steps are vLLM's own; leave it out"
    elif "vllm_xargs" not in type(request).model_fields and not isinstance(
        request,
        BatchChatCompletionRequest,  # which hands on the fields that it does not know
    ):
        problem = "kv_compression has no effect at this endpoint; leave it out"
    if problem:
        raise VLLMValidationError(problem, parameter=KEY)
