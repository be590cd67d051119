"""KV-Compress: squared attention of the prompt's queries, the last ones or all."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vllm_kvcompress.policies.watching import AttentionSum
from vllm_kvcompress.policies.window import WindowPolicy


@dataclass(frozen=True)
class KVCompress(WindowPolicy):
    """Squared attention that each token was paid, by the last `window` queries.

        s_i = Σ over the group of maxpool( Σ over the window's queries of A² )_i

    A is `[H, G, w, W]`, softmaxed over the window too; pooling runs over the tokens before the window,
    [0, W - w), and the first T of them are the scores `[H, T]`.

    Source: Rehg, "KV-Compress: Paged KV-Cache Compression with Variable Compression Rates per Attention
    Head", arXiv 2410.00161. Meant for the `global` allocation, which is the paper's block eviction. The
    paper goes on compressing while it decodes, which is the option `recompact_every` here.

    Attributes:
        window: w, queries observed; the paper uses 8 to 32.
        kernel_size: odd width of the max pooling, in tokens, per query head.
    """

    name: ClassVar[str] = "kv_compress"
    paper: ClassVar[str] = "KV-Compress: Paged KV-Cache Compression with Variable Rates (arXiv 2410.00161)"
    cost: ClassVar[str] = "attention of the last w queries over the prompt, once"
    squared: ClassVar[bool] = True
    reduction: ClassVar[Literal["mean", "sum"]] = "sum"
    pooling: ClassVar[Literal["max", "avg"]] = "max"  # type: ignore[misc]
    window: int = 32
    kernel_size: int = 7


@dataclass(frozen=True)
class KVCompressFull(AttentionSum):
    """Squared attention that each token was paid, by all queries so far.

        s_i = Σ over the group Σ over all queries of A_i²

    The paper's full variant: not pooled.

    Source: as `KVCompress`.
    """

    name: ClassVar[str] = "kv_compress_full"
    paper: ClassVar[str] = KVCompress.paper
    cost: ClassVar[str] = "the attention weights of every query, computed a second time"
    squared: ClassVar[bool] = True
