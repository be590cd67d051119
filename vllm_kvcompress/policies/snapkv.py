"""SnapKV: what the prompt's last queries attend to."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vllm_kvcompress.policies.window import WindowPolicy


@dataclass(frozen=True)
class SnapKV(WindowPolicy):
    """Attention that the last `window` queries pay to each token, pooled along tokens.

        s_i = mean over the group of pool( Σ over the window's queries of A )_i

    A is `[H, G, w, P]`, softmaxed over the window too; pooling runs over the tokens before the window,
    [0, P - w), and the first T of them are the scores `[H, T]`.

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.
    Defaults are the paper's: window 32, max pooling with kernel 7. Average pooling counts its zero padding,
    as the authors' code does, so the edges shrink.

    Deviations: the authors repeat keys per query head and keep tokens per query head; here a KV head has one
    score, the mean over its query heads, taken after pooling. Their softmax is rounded to the model's dtype
    before it is summed; here everything stays float32.

    Attributes:
        window: w, queries observed.
        kernel_size: odd width of the pooling, in tokens.
        pooling: "max" or "avg".
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469)"
    cost: ClassVar[str] = "attention of the last w queries over the prompt, once"
    squared: ClassVar[bool] = False
    reduction: ClassVar[Literal["mean", "sum"]] = "mean"
    window: int = 32
    kernel_size: int = 7
    pooling: Literal["max", "avg"] = "max"
