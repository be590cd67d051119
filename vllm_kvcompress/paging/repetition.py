"""Requests that repeat another request's context, or write about it: the attention they pay scores it."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.paging.groups import block_size, blocks_beside, num_groups, shares_contexts
from vllm_kvcompress.paging.job import Repetition

# The authors' words.
FIRST = "\n\nRepeat the previous context exactly."
NEXT = "\n\nRepeat the part of the previous context exactly, starting with"
# Ours: what the model is asked while it studies a context (Attention Matching).
STUDIES = (
    "\n\nSummarise the text above.",
    "\n\nWrite questions about details of the text above, each followed by its answer.",
    "\n\nList the names, numbers, dates and codes in the text above, and what each of them stands for.",
    "\n\nWrite what the text above states as JSON.",
)
OVERLAP = 8  # last tokens of the part before, which name where the next one starts
# Beside others' decoding repetitions have one part in so many of a step's tokens: they should cost a decoding
# client less than a neighbour's prompt does, which may have all, and they come to an end all the same.
SHARE = 4
LEAST = 256  # tokens behind a prompt that its repetition needs at least, the instruction included


def longest_repetition(vllm_config: VllmConfig, num_context: int, num_blocks: int) -> int:
    """Tokens behind a context that a repetition may have when nobody else is served.

    Bound by `max_model_len`, and by the blocks that its owner and the admission watermark leave.

    Args:
        vllm_config: of the engine.
        num_context: tokens of the context.
        num_blocks: of one engine core's pool; 0 if that is not known.
    """
    size = block_size(vllm_config)
    longest = vllm_config.model_config.max_model_len - num_context
    if not num_blocks:
        return longest
    usable = num_blocks - 1
    usable -= int(vllm_config.scheduler_config.watermark * num_blocks)
    of_context = -(-num_context // size)
    # Computed again, it has blocks of its own.
    left = (usable - 2 * blocks_beside(vllm_config)) // num_groups(vllm_config)
    left -= of_context * (1 if shares_contexts(vllm_config) else 2)
    return min(longest, left * size - num_context % size)


@dataclass
class _Progress:
    """How far the repetition of a context has come.

    Attributes:
        total: context tokens that are to be repeated, or questions that are to be studied.
        done: how many have been.
        repeating: the request that repeats the next part, while there is one.
        end: `done` after that part.
    """

    total: int
    done: int = 0
    repeating: Request | None = None
    end: int = 0


class Repetitions:
    """Turns a context into requests that repeat it part by part, one after the other.

    vLLM schedules them like any other prompt, in chunks beside everybody else's steps. They read the owner's
    blocks, and what they write goes back to the pool when they end.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config
        self._progress: dict[str, _Progress] = {}  # by owner
        self._announced: dict[str, Repetition] = {}  # by repeating request
        self._left: int | None = None  # tokens that one repetition may have in this step; None for no bound

    def next_part(self, owner: Request, config: KVCompressionConfig) -> Request | None:
        """The request that repeats the next part; None while one does or when all is repeated."""
        policy, context = config.build_policy(), owner.prompt_token_ids
        assert context is not None
        total = len(STUDIES) if policy.study_tokens else len(context)
        progress = self._progress.setdefault(owner.request_id, _Progress(total))
        if progress.repeating is not None or progress.done == total:
            return None
        begin, num_blocks = progress.done, self._config.cache_config.num_gpu_blocks or 0
        room = longest_repetition(self._config, len(context), num_blocks) - 1
        if policy.study_tokens:
            ask, part = self._encode(STUDIES[begin])[:room], range(len(context))
            repeated, max_tokens = [], max(1, min(policy.study_tokens, room + 1 - len(ask)))
            progress.end = begin + 1
        else:
            ask = self._encode(NEXT if begin else FIRST) + context[max(0, begin - OVERLAP) : begin]
            end = min(len(context), begin + max(1, min(policy.chunk, room - len(ask))))
            repeated, part, max_tokens = context[begin:end], range(begin, end), 1
            progress.end = end
        repeating = Request(
            request_id=f"{owner.request_id}:repeat-{begin}",
            prompt_token_ids=context + ask + repeated,
            # (Reading the prefix cache is skipped for vLLM's statistics: it reads its owner's blocks.)
            sampling_params=SamplingParams(
                temperature=0, max_tokens=max_tokens, skip_reading_prefix_cache=True
            ),
            pooling_params=None,
            client_index=owner.client_index,
            arrival_time=owner.arrival_time,
            lora_request=owner.lora_request,
            priority=owner.priority,
        )
        progress.repeating = repeating
        self._announced[repeating.request_id] = Repetition(
            repeating.request_id, owner.request_id, part.start, part.stop, len(context)
        )
        return repeating

    def fewest_steps(self, owner: Request, config: KVCompressionConfig) -> int:
        """Steps that the rest of a context's repetition takes beside its owner's decoding, at least."""
        policy, context = config.build_policy(), owner.prompt_token_ids
        if not policy.repeats:
            return 0
        assert context is not None
        progress = self._progress.get(owner.request_id, _Progress(0))
        if policy.study_tokens:
            return len(STUDIES) - progress.done
        left = len(context) - progress.done
        if progress.repeating is not None:  # it has come so far
            left -= max(progress.repeating.num_computed_tokens - len(context), 0)
        return max(-(-left // self._share), 0)

    def complete(self, owner_id: str) -> bool:
        """Whether all of a context is repeated, of which `next_part` was asked before."""
        return self._progress[owner_id].repeating is None

    def of(self, request_id: str) -> Repetition | None:
        """What a request repeats, if it is a repeating one."""
        return self._announced.get(request_id)

    def repeating(self, owner_id: str) -> Request | None:
        """The request that repeats a part of an owner's context, while there is one."""
        progress = self._progress.get(owner_id)
        return None if progress is None else progress.repeating

    def begin_step(self, num_decoding: int, num_left: int) -> None:
        """Bound what repetitions compute in a step: one of them, a share of the step, while others decode.

        Args:
            num_decoding: requests that decode.
            num_left: tokens of the step that those leave.
        """
        self._left = min(self._share, num_left) if num_decoding else None

    @property
    def _share(self) -> int:
        """Tokens of a step that a repetition has beside others, at most."""
        batch = self._config.scheduler_config.max_num_batched_tokens
        return max(batch // SHARE, self._config.cache_config.block_size)

    def bounded(self, request_id: str, num_tokens: int) -> int:
        """How many of these tokens of a request may be computed in this step."""
        if self._left is None or request_id not in self._announced:
            return num_tokens
        return min(num_tokens, self._left)

    def take_turn(self, request_id: str) -> None:
        """No other repetition computes in this step, if others decode."""
        if self._left is not None and request_id in self._announced:
            self._left = 0

    def announced(self, started: Iterable[str]) -> list[Repetition]:
        """The repetitions among the requests that start to be computed."""
        return [self._announced[name] for name in started if name in self._announced]

    def ended(self, request_id: str) -> None:
        """A request was freed; if it is a repeating one, its part is repeated."""
        repetition = self._announced.pop(request_id, None)
        if repetition is not None and (progress := self._progress.get(repetition.owner_id)) is not None:
            progress.done, progress.repeating = progress.end, None

    def abandon(self, owner_id: str) -> list[str]:
        """Forget an owner's progress; the ids of the requests to be aborted, at most one."""
        progress = self._progress.pop(owner_id, None)
        return [progress.repeating.request_id] if progress and progress.repeating else []

    def _encode(self, text: str) -> list[int]:
        tokenizer = cached_tokenizer_from_config(self._config.model_config)
        return tokenizer.encode(text, add_special_tokens=False)
