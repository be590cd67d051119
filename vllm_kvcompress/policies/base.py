"""What a token policy sees of a layer, and what it must answer."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vllm_kvcompress.matching import Fit, Units
from vllm_kvcompress.policies.rotary import Rotary

QUERY_BLOCK = 128  # queries whose attention is held at once


@dataclass(frozen=True)
class LayerObservation:
    """One layer of one request: the W tokens that it holds, of C computed.

    Before its first compaction a request holds all its tokens: W = C. Later each head holds what it kept, of
    which it may have kept fewer tokens than another: its columns begin with `padding`, which holds nothing.
    Columns are in position order, and the last ones are the raw tokens that all heads share.

    Attributes:
        keys: `[H, W, D]` in the model's dtype, after RoPE.
        values: `[H, W, D]`; empty while queries are observed.
        queries: `[w, H, G, D]` after RoPE, of the last w tokens; w is the policy's `window`, or the number of
            tokens of this step while queries are observed.
        scale: the layer's own softmax scale.
        num_scored: T: scores are wanted for columns 0..T-1, with T <= W - window.
        num_tokens: C, tokens computed.
        logits_soft_cap: logits are `cap·tanh(logits / cap)`; 0 for none.
        sinks: `[H, G]` float32, one more logit of each query head, behind the cap, to which no token belongs;
            None for none.
        padding: `[H]` int64, leading columns of each head that hold nothing; None for none.
        bias: `[H, W]` float32, added to the columns' logits behind the cap, where they were matched; None for
            none.
        state: what the policy's `observe` returned last.
        rotary: the layer's position embedding, by no angle where it has none; None if it is of another kind.
        output_projection: makes the layer's `[H, G, D, hidden]` output projection, float32; None if none was
            found whose input is what the layer puts out.
        layers: numbers of the layers whose heads these are, one layer after the other, counted from 0 in the
            model; more than one only for policies that say `stacks_layers`.
        first_head: which of the layer's KV heads the first one is; not 0 on later tensor-parallel ranks.
        kept_positions: makes what `positions` returns; None where column i is token i.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    num_scored: int
    num_tokens: int = 0
    logits_soft_cap: float = 0.0
    sinks: Tensor | None = None
    padding: Tensor | None = None
    bias: Tensor | None = None
    state: Any = None
    rotary: Rotary | None = None
    output_projection: Callable[[], Tensor] | None = None
    layers: tuple[int, ...] = (0,)
    first_head: int = 0
    kept_positions: Callable[[], Tensor] | None = None

    @property
    def layer(self) -> int:
        """The layer's number, of policies that see one at a time."""
        (layer,) = self.layers
        return layer

    def positions(self) -> Tensor:
        """Position in the sequence of each column's token, `[H, W]` int64; arbitrary in padding."""
        if self.kept_positions is not None:
            return self.kept_positions()
        heads, width = self.keys.shape[:2]
        return torch.arange(width, device=self.keys.device).expand(heads, -1)

    def holds(self) -> Tensor:
        """Which columns hold a token, `[H, W]` bool."""
        heads, width = self.keys.shape[:2]
        if self.padding is None:
            return torch.ones(heads, width, dtype=torch.bool, device=self.keys.device)
        return torch.arange(width, device=self.keys.device) >= self.padding[:, None]


@dataclass(frozen=True)
class RepeatedPart:
    """What of an observation is a part of the context that the model repeats.

    Attributes:
        columns: of the context's columns, which part.
        seen: where the observation has these; before them are attention sinks, behind them is the repetition.
        num_context: columns of the context.
    """

    columns: slice
    seen: slice
    num_context: int


class Policy(ABC):
    """Says how much each token of each head matters.

    Subclasses are dataclasses whose fields are the method's hyper-parameters with the paper's defaults.

    Attributes:
        name: what users write.
        paper: title and arXiv id.
        cost: one line on what scoring a prompt takes.
        reads_keys: False if the keys that it scores, and their queries, may be empty (`[H, W, 0]`).
        reads_values: False if their values may.
        observes_keys: False if the keys beside the queries that it observes may.
        stacks_layers: True if it scores several layers at once as if they were one with more heads: a head's
            scores depend on nothing but its keys, values and queries, the scale, the soft cap, the layer's
            number and what `stack` makes of its state. Layers of other rotary embeddings are others'
            if it `needs_rotary`.
        absolute: True if a score means the same in every prompt, so that it may be compared with a threshold.
        accumulates: True if it must `observe` every query. Its requests read no cached prefix, whose queries
            are never computed, so that what they keep does not depend on what was cached.
        sums: what `observe` adds up of each column over its group and all queries, attention or its square,
            if its state is that and no more, `[H, W]`: a kernel can do so in its place; else None.
        moments: first tokens whose queries `observe` leaves out, if its state is the `QueryStatistics` of all
            others and no more: a kernel can keep them in its place; else None.
        repeats: True if it must observe the queries with which the model repeats the context, see `repeat`.
        matches: True if it has biases and values of its own for what is kept, see `solve`.
        waits: True if a request whose context is repeated, or that is fitted, waits for its compaction.
        chunk: context tokens that are repeated at a time.
        study_tokens: where the model answers questions about the context instead of repeating it, the longest
            answer; else 0.
        sinks: first tokens that are observed with every such part.
        needs_rotary: True if it cannot do without the layer's rotary position embedding.
        needs_output_projection: True if it cannot do without the projection behind the layer.
        needs_own_keys: True if it cannot do with a latent that all query heads share (MLA) in place of keys.
        of_ranks: where the query heads that share a KV head are on several tensor-parallel ranks, what all of
            them say: the mean of the ranks' scores (which orders tokens as a sum does), or the largest.
        needs_known_shape: True if layers must have the KV heads and channels that the model's configuration
            says. A policy must say what it needs, so that it is refused where a model has it not.
        gives_losses: True if it answers `losses`.
        window: w, the number of last queries it needs; 0 for none.
        recalled: positions whose queries are kept of what it noted of a context (see `recall`), at most.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    reads_keys: ClassVar[bool] = True
    reads_values: ClassVar[bool] = True
    observes_keys: ClassVar[bool] = True
    stacks_layers: ClassVar[bool] = False
    absolute: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    sums: ClassVar[Literal["attention", "squares"] | None] = None
    moments: ClassVar[int | None] = None
    repeats: ClassVar[bool] = False
    matches: ClassVar[bool] = False
    waits: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = False
    needs_output_projection: ClassVar[bool] = False
    needs_own_keys: ClassVar[bool] = False
    of_ranks: ClassVar[Literal["mean", "max"]] = "mean"
    needs_known_shape: ClassVar[bool] = False
    gives_losses: ClassVar[bool] = False
    chunk: ClassVar[int] = 2048
    study_tokens: ClassVar[int] = 0
    sinks: ClassVar[int] = 4
    recalled: ClassVar[int] = 0

    @property
    def window(self) -> int:
        """w; a policy that looks at queries has a field of this name."""
        return 0

    @abstractmethod
    def score(self, observation: LayerObservation) -> Tensor:
        """Score every column below the boundary.

        Returns:
            `[H, T]` float32, higher = keep; scores of padding are ignored.
        """

    def num_recent(self, kept: int) -> int:
        """How many of the most recent tokens below the boundary count for more than all others, in every
        head; by default none.

        Args:
            kept: tokens that a head keeps on average.
        """
        return 0

    def expected_loss(self, kept: float) -> float:
        """What it should cost to keep so large a share of a request's bytes, beside other requests.

        Under pressure those are compacted first that free most for it. By default as KL divergence grows in
        what was measured, about as the inverse of what is kept.

        Args:
            kept: the share, above 0 and up to 1.
        """
        return 1 / kept - 1

    def losses(self, observation: LayerObservation, bases: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """What is lost with every column below the boundary in each of several ranks, if the policy says so.

        Args:
            observation: what `score` sees.
            bases: of each rank the orthonormal directions `[H, D, r]` float32 in which keys are left, and
                those of values.

        Returns:
            `[ranks + 1, H, T]` float32, comparable among heads and layers; the last is of dropping. What is
            said of padding is ignored.
        """
        raise NotImplementedError

    def observe(self, observation: LayerObservation) -> Any:
        """Take note of a step's queries, if the policy accumulates.

        Args:
            observation: the context up to and including the step's tokens.

        Returns:
            The new state.
        """
        raise NotImplementedError

    def repeat(self, observation: LayerObservation, part: RepeatedPart) -> Any:
        """Take note of queries with which the model repeats a part of the context, if the policy asks for it.

        Here `observe` answers a number of each column `[H, W]`, and the state is each column's largest.

        Args:
            observation: the attention sinks, the part, and the repetition up to and including these queries.
            part: which columns of it.

        Returns:
            The new state.
        """
        most = self.observe(replace(observation, state=None))
        state = observation.state
        if state is None:
            state = most.new_zeros(len(most), part.num_context)
        own = state[:, part.columns]
        torch.maximum(own, most[:, part.seen], out=own)
        return state

    def solve(
        self, observation: LayerObservation, heads: slice, columns: Tensor, present: Tensor, leading: int
    ) -> Units[tuple[Tensor, Tensor, Fit]]:
        """Which tokens are kept, once the number of them is known, and their biases and values, if the policy
        matches. Others' steps come between its units, so none should take long.

        Args:
            observation: of a layer; its keys and values are there, of these heads alone, whatever the policy
                says that it reads.
            heads: of the layer's, h of them.
            columns: `[h, t]` int64, the best by its scores, ascending.
            present: `[h, t]` bool, which of them are: heads keep different numbers.
            leading: first tokens that are kept whatever else is.

        Returns:
            Columns and which of them are, likewise, as many of each head, and what is put beside them.
        """
        raise NotImplementedError

    def fit_bytes(self, heads: int, tokens: int, columns: int, size: int, device_type: str) -> int:
        """Memory that `solve` takes at most.

        Args:
            heads: h.
            tokens: T.
            columns: t.
            size: D.
            device_type: as of `torch.device.type`: some hold more at a time.
        """
        raise NotImplementedError

    def most_fit_bytes(self, tokens: int, size: int, device_type: str) -> int:
        """The most that `fit_bytes` says of one head of so many tokens, whatever it keeps."""
        raise NotImplementedError

    def state_bytes(self, tokens: int, size: int, itemsize: int) -> int:
        """Memory of what a policy that matches notes of a head of so many tokens and channels, at most.

        Args:
            tokens: T.
            size: D.
            itemsize: bytes of a number of the model's dtype.
        """
        raise NotImplementedError

    def recall(self, state: Any) -> Any:
        """What is kept of a layer's state, for `later`, once all that it is noted for is solved; None for
        nothing. It takes no more memory than the queries `[recalled, H, G, D]`."""
        return None

    def carry(self, state: Any, kept: Tensor) -> Any:
        """The state after a compaction; of several layers at once where `score` sees several.

        Args:
            state: what `observe` returned last.
            kept: `[H, W]` int64, the old column of every new one; -1 for padding.
        """
        return state

    def stack(self, states: list[Any]) -> Any:
        """The states of layers that are scored at once; here of `[H, W]`, aligned at their last columns.

        Args:
            states: what `observe` returned last, of each layer; None for all of them if it was never called.
        """
        if len(states) == 1 or all(state is None for state in states):
            return states[0]
        widths, device = [state.shape[1] for state in states], states[0].device
        width = max(widths)
        if min(widths) == width:
            return torch.cat(states)
        held = torch.tensor(widths, pin_memory=device.type == "cuda").to(device, non_blocking=True)[:, None]
        column = held + torch.arange(-width, 0, device=device)  # of each layer's own, below 0 in padding
        whole = torch.cat(states, 1)[:, (held.cumsum(0) - held + column.clamp(min=0)).flatten()]
        aligned = whole.view(-1, len(states), width).transpose(0, 1)  # [l, H, W]
        return aligned.masked_fill(column[:, None] < 0, 0.0).flatten(0, 1)

    @property
    def scored_by(self) -> "Policy":
        """The policy whose `score` answers: this one, unless it only refines another's."""
        return self

    @property
    def later(self) -> "Policy":
        """The policy that scores what is compacted again, and prompts that it left alone: this one, unless it
        knows what it knows of whole prompts alone."""
        return self

    def refine(self, scores: Tensor, kept: Tensor, observation: LayerObservation) -> Tensor:
        """Change scores once the number of tokens that each head keeps is known.

        Args:
            scores: `[H, T]` float32 of this policy, +inf where a token is protected, -inf for padding.
            kept: `[H]` int64, tokens that each head keeps.
            observation: what `score` saw.

        Returns:
            `[H, T]` float32, from which the tokens are selected.
        """
        return scores


def attention_blocks(observation: LayerObservation, causal: bool = True) -> Iterator[Tensor]:
    """Attention of queries over all W columns, some queries at a time.

        A = softmax(cap·tanh(scale·q·kᵀ / cap)), or softmax(scale·q·kᵀ) without a cap

    What was matched has biases, which are added to these logits. Where there are sinks, the softmax is over
    these logits and the sink's: A sums to less than 1.

    One matrix product per KV head serves its whole group: nothing is repeated per query head.
    Logits and softmax are float32 whatever the model's dtype: in bf16 most scores of a long prompt tie.

    Args:
        observation: of a layer.
        causal: whether its queries are the newest ones, which see nothing behind their own columns; else they
            see all.

    Yields:
        `[H, G, q, W]` float32 with q <= QUERY_BLOCK, in position order.
    """
    num_queries = observation.queries.shape[0]
    keys, cap = observation.keys.float().transpose(1, 2), observation.logits_soft_cap
    alpha = observation.scale / cap if cap else observation.scale
    absent = None if observation.padding is None else ~observation.holds()[:, None, None]
    for begin in range(0, num_queries, QUERY_BLOCK):
        queries = observation.queries[begin : begin + QUERY_BLOCK]
        size, heads, group, _ = queries.shape
        flat = queries.permute(1, 2, 0, 3).reshape(heads, group * size, -1).float()
        logits = torch.empty(*flat.shape[:2], keys.shape[2], device=keys.device)
        with exact_products(observation.keys, observation.queries):
            torch.baddbmm(logits, flat, keys, beta=0, alpha=alpha, out=logits)
        if cap:
            logits.tanh_().mul_(cap)
        logits = logits.view(heads, group, size, -1)
        if observation.bias is not None:
            logits += observation.bias[:, None, None]
        if causal:
            newer = num_queries - begin  # columns from the block's first query on
            future = torch.ones(size, newer, dtype=torch.bool, device=logits.device).triu(1)
            logits[..., -newer:].masked_fill_(future, -torch.inf)
        if absent is not None:
            logits.masked_fill_(absent, -torch.inf)
        yield softmax_beside(observation.sinks, logits)


def softmax_beside(sinks: Tensor | None, logits: Tensor) -> Tensor:
    """The softmax of logits `[H, G, q, W]`, in place: each query head's among one more, its sink `[H, G]`."""
    if sinks is None:
        return torch.softmax(logits, -1, out=logits)
    share = torch.sigmoid(logits.logsumexp(-1, keepdim=True) - sinks[..., None, None])
    return torch.softmax(logits, -1, out=logits).mul_(share)


def window_attention(observation: LayerObservation) -> Tensor:
    """Causal attention of the observation window over all columns, the window included.

    Returns:
        `[H, G, w, W]` float32.
    """
    blocks = list(attention_blocks(observation))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@contextmanager
def exact_products(*factors: Tensor) -> Iterator[None]:
    """Have float32 products of what was bfloat16 computed as such, on CPUs that can.

    Products are exact either way and are added up in float32: only the order differs. The setting is the
    process's own, in which one thread computes.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    exact = all(factor.dtype == torch.bfloat16 and factor.device.type == "cpu" for factor in factors)
    if exact and multiplies_bfloat16():
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
