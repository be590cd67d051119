"""What users write: the method, its budget and its options, engine-wide or per request."""

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

from vllm_kvcompress.allocation import ALLOCATIONS, Allocation, Global
from vllm_kvcompress.formats import FORMATS, MATCHED, Format, Mixed, MixedDim
from vllm_kvcompress.policies import POLICIES, Policy
from vllm_kvcompress.policies.foresight import Foresight
from vllm_kvcompress.policies.streaming_llm import StreamingLLM

DEFAULT_BUDGET = 0.25
DEFAULT_WINDOW = 32
MOST_WINDOW = 1024
MOST_VALUE = 2**31 - 1  # of a number: beyond it kernels overflow
STREAMING_INTERVAL = 1024
ENCODING_INTERVAL = 128  # KIVI's residual
LADDER = (0.5, 0.25, 0.125)
MATCHED_FORMAT = "k4v3"  # of methods that match, which need a place for biases
DEFAULT_BASE = "snapkv"  # of a policy on top of another one
# What all requests share in: what bounds a step, and a share of the pool.
ENGINES_OWN = "max_compaction_tokens", "prefix_share", "prefix_folder"
# Options that say when a request is compacted, and not to what.
NOT_OF_CONTENT = {"when", "ladder", "min_freed_tokens", "prefix", "enabled", *ENGINES_OWN}
MOST_NAME = 128  # characters of a prefix's name
AUTO = "auto"
AUTO_WITHOUT_SCORER = "kv_compress"
AUTO_UNDER_PRESSURE = "keydiff"  # without a scorer: what looks at no query, so that none is kept
_BOOLEANS = {"true": True, "false": False}


class KVCompressionError(ValueError):
    """A mistake in what the user asked for, said in one line."""


@dataclass(frozen=True)
class Method:
    """A named preset from the literature: a policy and the allocation it is published with.

    One with a format keeps every token; only with a budget its policy and allocation choose among them. A
    format that cannot keep every token in fewer bytes has one always.
    """

    policy: str
    allocation: str
    summary: str
    format: str | None = None

    @property
    def paper(self) -> str:
        """Title and arXiv id; the allocation's too where it is a method of its own."""
        if self.format is not None:
            return FORMATS[self.format].paper
        papers = [POLICIES[self.policy].paper]
        if self.allocation in ("adaptive", "pyramid"):
            papers.append(ALLOCATIONS[self.allocation].paper)
        return " + ".join(papers)

    @property
    def keeps_all(self) -> bool:
        """Whether it keeps every token unless there is a budget."""
        return self.format is not None and FORMATS[self.format].keeps_all

    @property
    def cost(self) -> str:
        """One line on what scoring a prompt takes."""
        if self.keeps_all:
            return "none without a budget; with one as " + self.policy
        return POLICIES[self.policy].cost


METHODS: dict[str, Method] = {
    "streaming_llm": Method("streaming_llm", "uniform", "attention sinks and the most recent tokens"),
    "snapkv": Method("snapkv", "uniform", "what the prompt's last queries attend to"),
    "adakv": Method("snapkv", "adaptive", "SnapKV scores; heads of a layer compete for its budget"),
    "pyramidkv": Method("snapkv", "pyramid", "SnapKV scores; lower layers keep more"),
    "kv_compress": Method("kv_compress", "global", "squared attention; all heads and layers compete"),
    "kv_compress_full": Method("kv_compress_full", "global", "squared attention of all queries"),
    "h2o": Method("h2o", "uniform", "what all queries so far attended to, and the most recent tokens"),
    "expected_attention": Method("expected_attention", "uniform", "what future queries should attend to"),
    "criticalkv": Method("criticalkv", "uniform", "SnapKV scores, then those times ‖W_O v‖"),
    "kvzip": Method("kvzip", "global", "what the model needs to repeat its context; asks no question"),
    "attention_matching": Method(
        "attention_matching",
        "global",
        "biases and values solved for, so that what is kept answers as all did; asks no question",
    ),
    "foresight": Method(
        "foresight", "global", "learned: what the cached key and value say; asks no question"
    ),
    "tova": Method("tova", "uniform", "what the last token attends to, all heads of a layer together"),
    "knorm": Method("knorm", "uniform", "keys of small norm"),
    "keydiff": Method("keydiff", "uniform", "keys unlike the others"),
    "kivi": Method(
        "kv_compress", "global", "every token in 4 bits: keys by channel, values by token", "kivi4"
    ),
    "turboquant": Method(
        "kv_compress",
        "global",
        "every token in 4 bits of a random rotation, and its length; keys less their mean",
        "turbo4_centred",
    ),
    "mixed_dim_kv": Method(
        "mixed_dim_kv",
        "global",
        "each token in all, a quarter or an eighth of its coordinates in a basis of its head, or dropped",
        "mixed_dim",
    ),
    "mixed_dim_kv_h": Method(
        "mixed_dim_kv",
        "profile",
        "likewise, heads weighted by their profile: give allocation=profile:PATH",
        "mixed_dim",
    ),
}


@dataclass(frozen=True)
class KVCompressionConfig:
    """How KV caches are compressed.

    Attributes:
        method: a name listed by `vllm-kvcompress methods`, or `METHOD+FORMAT`.
        budget: fraction of the raw bytes below the boundary that is kept, 0 < budget <= 1; with a threshold,
            the most that is. None for 0.25; of methods that are formats, for every token and the bytes that
            they take.
        allocation: how pages are shared among heads, `NAME` or `profile:PATH`; None for the method's own.
        sink_tokens: first tokens of a prompt, never dropped.
        window: last prompt tokens, never dropped, whose queries score the others; None for the method's own.
            Of methods that match, and look at their window where they compact again, 32.
        when: "prompt": once a prompt is computed; "streaming": also while it is computed, every
            `recompact_every` tokens, so that it may be larger than the pool; "pressure": when blocks run
            short, whoever waits to be admitted or would be preempted otherwise.
        ladder: under pressure, the fractions of the raw bytes that a request comes down to one after the
            other, falling, those above `budget`, and then that; None for 0.5, 0.25, 0.125.
        recompact_every: tokens of output after which a request is compacted again; None for never (1024
            when streaming, 128 with a format, unless the method watches every query).
        max_tokens_kept: mean number of tokens that a head keeps below the boundary, at most; None for no
            limit but the budget.
        min_freed_tokens: a prompt whose first compaction would free fewer tokens than that is left alone, for
            compacting it costs more than it gains. With `recompact_every` it is looked at again at its next
            point; once it was compacted, and with `when="streaming"`, compactions just follow their interval.
            Under pressure no compaction frees less.
        max_compaction_tokens: tokens that the compactions of one step read, at most, though one is made
            whatever it reads; None for `max_num_batched_tokens`. The engine's: a request may not give it.
        scorer: of the method `foresight`, a file or the name of a packaged one; None for the one that is
            found for the model: beside its checkpoint, in the cache folder, or packaged.
        threshold: score above which a token is kept, so that each request keeps as much as it needs: as many
            blocks as hold every page with a better token. For methods whose scores mean the same in every
            prompt. None for all that the budget allows.
        format: how kept tokens are written in their pages; None for the method's own, or as vLLM has them
            (k4v3 with biases where the method solves for these).
        prefix: a name, of 1 to 128 characters, under which what a request's prompt is compacted to is kept
            for later ones that begin with the same tokens, until it is deleted. A request's: an engine may
            not be given it.
        prefix_share: part of the pool in which what finished requests were compacted to is kept, until
            somebody needs the blocks, for later ones that begin with the same tokens; 0 <= share < 1. The
            engine's: a request may not give it.
        prefix_folder: where prefixes that have a name are saved, and loaded from when an engine starts; None
            for nowhere. The engine's: a request may not give it.
        options: further hyper-parameters of the policy and the allocation, by name.
        enabled: False leaves requests uncompressed unless they ask for it themselves.

    Raises:
        KVCompressionError: an unknown name or a value out of range.
    """

    method: str = "snapkv"
    budget: float | None = None
    allocation: str | None = None
    sink_tokens: int = 4
    window: int | None = None
    when: Literal["prompt", "streaming", "pressure"] = "prompt"
    ladder: tuple[float, ...] | None = None
    recompact_every: int | None = None
    max_tokens_kept: int | None = None
    min_freed_tokens: int = 256
    max_compaction_tokens: int | None = None
    scorer: str | None = None
    threshold: float | None = None
    format: str | None = None
    prefix: str | None = None
    prefix_share: float = 0.0
    prefix_folder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True

    def __post_init__(self) -> None:
        for name, kind in _OWN_TYPES.items():
            object.__setattr__(self, name, _convert(name, getattr(self, name), kind))
        for name, value in _split_format({"method": self.method, "format": self.format}).items():
            object.__setattr__(self, name, value)
        _known(self.method, [AUTO, *METHODS, *POLICIES], "method", "`vllm-kvcompress methods` lists them")
        if self.allocation is not None:
            name = self.allocation.partition(":")[0]
            _known(name, ALLOCATIONS, "allocation", "use one of " + ", ".join(ALLOCATIONS))
        if self.format is not None:
            _known(self.format, FORMATS, "format", "use one of " + ", ".join(FORMATS))
        whole = self.preset.keeps_all and FORMATS[self.format or str(self.preset.format)].keeps_all
        if self.budget is None and not whole:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise KVCompressionError(
                f"budget must be a fraction of the cache to keep, 0 < budget <= 1, got {self.budget}"
            )
        if self.threshold is not None and self.threshold <= 0:
            raise KVCompressionError(f"threshold must be a score above 0, got {self.threshold}")
        if self.ladder is not None and not _falls(self.ladder):
            raise KVCompressionError(
                f"ladder must be falling fractions, 0 < fraction <= 1, got {list(self.ladder)}"
            )
        if self.ladder is not None and (self.when != "pressure" or self.budget is None):
            raise KVCompressionError(
                "ladder leads down to a budget under pressure: use it with when=pressure and a budget"
            )
        if self.sink_tokens < 0:
            raise KVCompressionError(f"sink_tokens must be at least 0, got {self.sink_tokens}")
        if self.window is not None and not 1 <= self.window <= MOST_WINDOW:
            raise KVCompressionError(f"window must be 1 to {MOST_WINDOW}, got {self.window}")
        if self.recompact_every is not None and self.recompact_every < 1:
            raise KVCompressionError(f"recompact_every must be at least 1, got {self.recompact_every}")
        if self.max_tokens_kept is not None and self.max_tokens_kept < max(1, self.sink_tokens):
            raise KVCompressionError(
                f"max_tokens_kept must be at least 1 and sink_tokens, got {self.max_tokens_kept}"
            )
        if not 0 <= self.prefix_share < 1:
            raise KVCompressionError(
                f"prefix_share must be a part of the pool, 0 <= prefix_share < 1, got {self.prefix_share}"
            )
        if self.prefix is not None:
            check_name(self.prefix)
        if self.prefix is not None and self.when == "pressure":
            raise KVCompressionError(
                "a prefix is compacted once its prompt is computed; remove when=pressure"
            )
        for name in ("min_freed_tokens", "max_compaction_tokens"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise KVCompressionError(f"{name} must be at least 1, got {number}")
        types = self._option_types()
        options = {}
        for name, value in self.options.items():
            if name in _OWN_TYPES:
                raise KVCompressionError(f"give {name} by itself, not among the method's options")
            _known(name, [*types, *_OWN_TYPES], f"option of {self.method}", "see `vllm-kvcompress methods`")
            options[name] = _convert(name, value, types[name])
        object.__setattr__(self, "options", MappingProxyType(options))
        try:
            self.build_policy(), self.build_allocation()
            if self.scorer is not None:
                Foresight(self.scorer)  # read once, at the start of a process, whatever its requests ask for
        except KVCompressionError:
            raise
        except ValueError as error:
            raise KVCompressionError(f"{self.method}: {error}") from None
        if self.matches and isinstance(self._written, Mixed | MixedDim):
            raise KVCompressionError(
                f"{self.method} solves for tokens of one format, and {self._written.name} mixes several; use "
                "another format"
            )
        if self.threshold is not None and not self.build_policy().absolute:
            able = ", ".join(name for name, policy in POLICIES.items() if policy.absolute)
            raise KVCompressionError(
                f"scores of {self.method} mean nothing across prompts: use threshold with one of {able}, "
                "or budget alone"
            )
        if self.threshold is not None and not isinstance(self.build_allocation(), Global):
            raise KVCompressionError(
                "threshold counts the pages of all heads together: use allocation=global"
            )
        if self.when == "pressure":
            self._check_under_pressure()
        if self.threshold is not None and self.record_format is not None:
            raise KVCompressionError(
                f"threshold counts tokens as vLLM has them: leave it or the format {self.record_format.name}"
            )
        if self.max_tokens_kept is not None and isinstance(self.record_format, Mixed | MixedDim):
            raise KVCompressionError(
                f"max_tokens_kept counts tokens, and {self.record_format.name} keeps as many as their bits "
                "allow: use budget alone, or another format"
            )
        if self.matches and self.when == "streaming":
            raise KVCompressionError(
                f"{self.method} solves for a whole prompt at once; remove when=streaming"
            )
        if self.record_format is not None and self.observes_all and self.interval is not None:
            raise KVCompressionError(
                f"{self.method} watches every query, which it cannot over {self.record_format.name}; "
                "remove when=streaming and recompact_every, or the format"
            )
        if self.repeats and self.interval is not None and not self.matches:
            raise KVCompressionError(
                f"{self.method} scores a whole prompt at once; remove when=streaming and recompact_every"
            )

    def _check_under_pressure(self) -> None:
        if self.recompact_every is not None:
            raise KVCompressionError(
                "recompact_every and when=pressure both say when a request is compacted again; remove one"
            )
        if self.threshold is not None:
            raise KVCompressionError(
                "threshold and when=pressure both say how much a request keeps; remove one"
            )
        if self.watches_every_query:
            raise KVCompressionError(
                f"{self.method} watches every query, also of requests that stay raw; with when=pressure use "
                "foresight, a method that needs keys alone, or one with a window"
            )

    # ------------------------------------------------------------------ reading

    @classmethod
    def parse(cls, value: "str | Mapping | KVCompressionConfig") -> "KVCompressionConfig":
        """Read any form users write: `"snapkv:budget=0.25"`, `"off"`, a JSON object, or a dictionary.

        Raises:
            KVCompressionError: the form, a name or a value is wrong.
        """
        return value if isinstance(value, cls) else cls._of(_as_dict(value))

    @staticmethod
    def with_prefix(value: "str | Mapping | None", name: str) -> dict[str, Any]:
        """The options of any form, and a name for what they compact a prompt to.

        Raises:
            KVCompressionError: the form is wrong, or it names a prefix itself.
        """
        flat = {} if value is None else _as_dict(value)
        if "prefix" in flat:
            raise KVCompressionError("give the prefix its name by itself, not among the options")
        return flat | {"prefix": name}

    @staticmethod
    def named_files(value: "str | Mapping") -> tuple[str, str]:
        """The head profile and the scorer that any form names, without a look at the files; `""` for none.

        Raises:
            KVCompressionError: the form is wrong.
        """
        flat = _as_dict(value)
        allocation, _, profile = str(flat.get("allocation")).partition(":")
        scorer = flat.get("scorer")
        return profile if allocation.strip() == "profile" else "", "" if scorer is None else str(scorer)

    @classmethod
    def _of(cls, flat: Mapping[str, Any]) -> "KVCompressionConfig":
        own = {name: flat[name] for name in _OWN_TYPES if name in flat}
        return cls(**own, options={name: value for name, value in flat.items() if name not in _OWN_TYPES})

    def for_request(self, value: "str | Mapping | None") -> "KVCompressionConfig":
        """This configuration with a request's own options on top.

        Naming another method drops this one's allocation, threshold and format, and the hyper-parameters
        that the other does not have; budget, sink_tokens and window stay, the budget not for methods that
        are formats. `"off"` disables compression; any other value enables it where the engine's default is
        off.

        Raises:
            KVCompressionError: as for `parse`.
        """
        return self if value is None else _for_request(self, _frozen(_as_dict(value)))

    def to_dict(self) -> dict[str, Any]:
        """A flat JSON-serialisable form that `parse` reads back."""
        own = {name: getattr(self, name) for name in _OWN_TYPES}
        return {name: value for name, value in own.items() if value is not None} | dict(self.options)

    def engine_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for vLLM's `LLM` or `AsyncEngineArgs`."""
        return {"additional_config": {"kv_compression": self.to_dict()}}

    def __hash__(self) -> int:
        return hash(_frozen(self.to_dict()))

    def __reduce__(self):
        return _rebuild, (self.to_dict(),)

    # ------------------------------------------------------------------ meaning

    @property
    def preset(self) -> Method:
        """The preset that `method` names; a policy registered by user code is its own, with uniform pages."""
        if self.method == AUTO:
            return METHODS["foresight" if self.scorer else self.auto_without_scorer]
        return METHODS.get(self.method) or Method(self.method, "uniform", "registered by user code")

    @property
    def auto_without_scorer(self) -> str:
        """What `auto` is where no scorer of the model is found."""
        return AUTO_UNDER_PRESSURE if self.when == "pressure" else AUTO_WITHOUT_SCORER

    @property
    def record_format(self) -> Format | None:
        """How kept tokens are written; None for as vLLM has them."""
        written = self._written
        return MATCHED[written.name] if written is not None and self.matches else written

    @property
    def _written(self) -> Format | None:
        """How keys and values are."""
        name = self.format or self.preset.format or (MATCHED_FORMAT if self.matches else None)
        return None if name is None else FORMATS[name]

    @property
    def keeps_all(self) -> bool:
        """Whether every token is kept, in fewer bytes."""
        return self.budget is None and self.max_tokens_kept is None

    def build_policy(self) -> Policy:
        """The policy with this configuration's hyper-parameters; where every token is kept, one that needs
        nothing."""
        if self.keeps_all:
            return StreamingLLM()
        return self._build(POLICIES[self.preset.policy])

    def _build(self, cls: type[Policy]) -> Policy:
        options = self._options_of(cls)
        if cls.matches:  # its window is of outputs, and none of them is compacted unless it is asked for
            options["window"] = self.window or DEFAULT_WINDOW if self.recompact_every is not None else 0
        elif self.window is not None and "window" in _field_types(cls):
            options["window"] = self.window
        if self.scorer is not None and "scorer" in _field_types(cls):
            options["scorer"] = self.scorer
        if "base" in _field_types(cls):  # a policy on top of another one
            options["base"] = self._build(self._base(cls))
        return cls(**options)

    def _base(self, cls: type[Policy]) -> type[Policy]:
        name = self.options.get("base", DEFAULT_BASE)
        _known(name, POLICIES, f"base policy of {self.method}", "use one of " + ", ".join(POLICIES))
        if POLICIES[name] is cls:
            raise KVCompressionError(f"base of {self.method} must be another policy")
        return POLICIES[name]

    def build_allocation(self) -> Allocation:
        """The allocation with this configuration's hyper-parameters."""
        return self._allocation

    @functools.cached_property
    def _allocation(self) -> Allocation:
        # Built once: a file that it reads must not have to stay for as long as requests are served.
        cls, argument = self._allocation_and_argument()
        if argument and cls.argument is None:
            raise KVCompressionError(f"allocation {cls.name} takes no argument, got {argument!r}")
        given = {cls.argument: argument} if cls.argument else {}
        return cls(**given, **self._options_of(cls))

    def _allocation_and_argument(self) -> tuple[type[Allocation], str]:
        """`NAME:ARGUMENT` as a class and what is behind the colon."""
        name, _, argument = (self.allocation or self.preset.allocation).partition(":")
        return ALLOCATIONS[name], argument

    @functools.cached_property
    def observed_window(self) -> int:
        """Last prompt queries that the policy needs."""
        return self.build_policy().window

    @property
    def recent_tokens(self) -> int:
        """Last prompt tokens that are never dropped."""
        return max(self.observed_window, self.window or 0) or DEFAULT_WINDOW

    @functools.cached_property
    def observes(self) -> bool:
        """Whether the policy needs anything of a request's queries."""
        policy = self.build_policy()
        return bool(policy.window) or policy.accumulates or policy.repeats

    @functools.cached_property
    def observes_all(self) -> bool:
        """Whether the policy must see every query, so that no cached prefix can be read."""
        return self.build_policy().accumulates

    @functools.cached_property
    def repeats(self) -> bool:
        """Whether the policy needs the context repeated by the model."""
        return self.build_policy().repeats

    @functools.cached_property
    def matches(self) -> bool:
        """Whether the policy solves for biases and values of what it keeps."""
        return self.build_policy().matches

    @functools.cached_property
    def waits(self) -> bool:
        """Whether a request waits for its repetition and its solution, rather than decode meanwhile."""
        return self.build_policy().waits or self.prefix is not None

    @property
    def watches_every_query(self) -> bool:
        """Whether something must run beside attention in every step."""
        return self.observes_all or self.repeats

    def kept_in_graphs(self, speculates: bool) -> Literal["sums", "moments"] | None:
        """What a GPU's kernel keeps in the policy's place, also inside a captured graph; None for nothing.

        Args:
            speculates: whether drafts may be among a step's tokens: what is added up cannot be taken back.
        """
        policy = self.build_policy()
        if speculates:
            return None
        return "sums" if policy.sums is not None else "moments" if policy.moments is not None else None

    @property
    def interval(self) -> int | None:
        """Tokens between two compactions of a request; None where there is only one, or it is not known."""
        if self.when == "streaming":
            return self.recompact_every or STREAMING_INTERVAL
        if self.when == "pressure":
            return None
        if self.recompact_every is None and self.record_format is not None and not self.watches_every_query:
            return ENCODING_INTERVAL
        return self.recompact_every

    @property
    def compacts_again(self) -> bool:
        """Whether a request may be compacted more than once."""
        return self.interval is not None or self.when == "pressure"

    @property
    def remembers(self) -> bool:
        """Whether the positions of what is kept may be asked for later."""
        return self.compacts_again or self.prefix is not None or self.prefix_share > 0

    @functools.cached_property
    def content(self) -> str:
        """What two requests of the same tokens have in common that are compacted to the same."""
        return _frozen({name: value for name, value in self.to_dict().items() if name not in NOT_OF_CONTENT})

    @functools.cached_property
    def expected_loss(self) -> Callable[[float], float]:
        """What the policy expects to be lost with what is kept, see `Policy.expected_loss`."""
        return self.build_policy().expected_loss

    @property
    def ladder_steps(self) -> tuple[float | None, ...]:
        """Under pressure, the budgets of a request's compactions one after the other."""
        steps = LADDER if self.ladder is None else self.ladder
        return *(step for step in steps if step > (self.budget or 1)), self.budget

    def _option_types(self) -> dict[str, Any]:
        allocation, _ = self._allocation_and_argument()
        policy = POLICIES[self.preset.policy]
        types = _field_types(policy) | _field_types(allocation)
        if allocation.argument is not None:
            types = {name: kind for name, kind in types.items() if name != allocation.argument}
        if "base" in _field_types(policy):
            types = _field_types(self._base(policy)) | types | {"base": str}
        return types

    def _options_of(self, cls: type) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name in _field_types(cls)}


def check_name(name: object) -> None:
    """Refuse what cannot be a prefix's name.

    Raises:
        KVCompressionError: it is not a string, or not one of 1 to `MOST_NAME` printable characters.
    """
    if not (isinstance(name, str) and 0 < len(name) <= MOST_NAME and name.isprintable()):
        raise KVCompressionError(f"prefix must be a name of 1 to {MOST_NAME} printable characters")


_OWN_TYPES: dict[str, Any] = {
    f.name: f.type for f in dataclasses.fields(KVCompressionConfig) if f.name != "options"
}


@functools.lru_cache(maxsize=1024)
def _for_request(engine: KVCompressionConfig, request: str) -> KVCompressionConfig:
    override = _split_format(json.loads(request))
    for name in ENGINES_OWN:
        if name in override:
            raise KVCompressionError(
                f"{name} is the engine's; leave it out of requests and start the server with it"
            )
    flat = engine.to_dict() | {"enabled": True}
    if override.get("prefix") is not None and engine.when == "pressure":
        override = {"when": "prompt"} | override
    if override.get("when", engine.when) != engine.when:
        flat.pop("ladder", None)
    if override.get("method", engine.method) != engine.method:
        for name in ("allocation", "threshold", "format"):
            flat.pop(name, None)
        if (preset := METHODS.get(str(override["method"]))) is not None and preset.keeps_all:
            flat.pop("budget", None)
    own = {name: value for name, value in (flat | override).items() if name in ("method", "allocation")}
    kept = KVCompressionConfig(**own)._option_types().keys() | _OWN_TYPES.keys()
    return KVCompressionConfig._of({name: flat[name] for name in flat.keys() & kept} | override)


def _rebuild(flat: dict[str, Any]) -> KVCompressionConfig:
    return KVCompressionConfig.parse(flat)


def _as_dict(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        flat = dict(value)
        if flat.get("method") == "off":
            del flat["method"]
            flat["enabled"] = False
        return flat
    if not isinstance(value, str):
        raise KVCompressionError(f"kv_compression must be a string or a dictionary, got {value!r}")
    text = value.strip()
    if text.startswith("{"):
        try:
            return _as_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise KVCompressionError(f"kv_compression is not valid JSON: {error}") from None
    method, _, assignments = text.partition(":")
    parsed: dict[str, Any] = {"method": method}
    for assignment in filter(None, assignments.split(",")):
        name, equals, option = (part.strip() for part in assignment.partition("="))
        if not equals and isinstance(parsed.get("ladder"), list) and list(parsed)[-1] == "ladder":
            parsed["ladder"].append(name)
            continue
        if not equals:
            raise KVCompressionError(
                f"kv_compression option {assignment!r} has no value; write METHOD:NAME=VALUE,NAME=VALUE"
            )
        if name in parsed:
            raise KVCompressionError(f"kv_compression option {name!r} is given twice; remove one")
        parsed[name] = [option] if name == "ladder" else option
    return _as_dict(parsed)


def _split_format(flat: dict[str, Any]) -> dict[str, Any]:
    """With `METHOD+FORMAT` as a method and a format.

    Raises:
        KVCompressionError: the format is given by itself, too.
    """
    method, plus, name = str(flat.get("method")).partition("+")
    if not plus:
        return flat
    if flat.get("format") not in (None, name):
        raise KVCompressionError(f"kv_compression option 'format' is given twice, in {flat['method']!r} too")
    return flat | {"method": method.strip(), "format": name.strip()}


def _frozen(flat: Mapping[str, Any]) -> str:
    # As JSON rather than as a tuple, in which 1 and True would be the same value.
    try:
        return json.dumps(flat, sort_keys=True)
    except (TypeError, ValueError):
        raise KVCompressionError(f"kv_compression options must be plain values, got {flat!r}") from None


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _known(name: str, known: Collection[str], what: str, remedy: str) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else remedy
    raise KVCompressionError(f"unknown kv_compression {what} {name!r}; {hint}")


def _falls(steps: tuple[float, ...]) -> bool:
    """Whether these are falling fractions."""
    return bool(steps) and steps[0] <= 1 and steps[-1] > 0 and all(a > b for a, b in pairwise(steps))


def _convert(name: str, value: Any, kind: Any) -> Any:
    """A value as typed on a command line or in JSON, as the option's own type."""
    allowed = typing.get_args(kind) or (kind,)
    if tuple[float, ...] in allowed and value not in (None, "none", "None"):
        steps = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(name, step, float) for step in steps)
    if type(None) in allowed and value in (None, "none", "None"):
        return None
    if value in allowed:  # a literal
        return value
    for read in (int, float, _BOOLEANS.__getitem__) if isinstance(value, str) and str not in allowed else ():
        try:
            value = read(value.lower())
            break
        except (KeyError, ValueError):
            continue
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) in (int, float) and not abs(value) <= MOST_VALUE:  # NaN neither
        raise KVCompressionError(f"kv_compression option {name} is out of range, got {str(value)[:20]}")
    if type(value) not in allowed:
        wanted = " or ".join(getattr(k, "__name__", repr(k)) for k in allowed if k is not type(None))
        raise KVCompressionError(f"kv_compression option {name} must be {wanted}, got {value!r}")
    return value
