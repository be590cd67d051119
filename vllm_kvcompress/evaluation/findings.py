"""What `check` finds of a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose caches are alike.

    Attributes:
        layers: their numbers.
        what: what they cache.
        becomes: "compacted", "left" to vLLM, or "shared" for those that read another layer's cache.
        reason: why they are not compacted; empty if they are.
    """

    layers: list[int]
    what: str
    becomes: str
    reason: str = ""


@dataclass(frozen=True)
class Held:
    """What a pool holds of requests that are alike.

    Attributes:
        blocks: of the pool that one holds at its end.
        requests: at once, all of them up to their ends.
        tokens: of these.
    """

    blocks: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class Finding:
    """What `check` says of a model.

    Attributes:
        model: its name.
        architecture: as vLLM has it.
        groups: its layers.
        refused: methods that it cannot be served with, and why not.
        untold: methods that need something of the weights, and what.
        blocks: of the pool that requests can hold.
        memory_bytes: of the pool.
        prompt_tokens: of each request.
        output_tokens: likewise.
        raw: what the pool holds without compression.
        compressed: what it holds with it.
    """

    model: str
    architecture: str
    groups: list[LayerGroup]
    refused: dict[str, str]
    untold: dict[str, str]
    blocks: int
    memory_bytes: int
    prompt_tokens: int
    output_tokens: int
    raw: Held
    compressed: Held
