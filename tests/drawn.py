"""What lies beside models with random weights."""

from pathlib import Path
from typing import Any

import torch

from vllm_kvcompress import scorers


def draw_scorer(folder: Path, config: Any, layers: int, heads: int, head_size: int) -> None:
    """Put a random scorer beside a model.

    Args:
        folder: the model's.
        config: its text part's Hugging Face configuration.
        layers: L.
        heads: KV heads of the whole model.
        head_size: D.
    """
    shapes = (2 * head_size, 16), (16,), (16,), ()
    networks = (torch.randn(layers, heads, *shape) / 2 for shape in shapes)
    path = folder / scorers.BESIDE
    path.parent.mkdir(exist_ok=True)
    scorers.write(path, scorers.Scorer(folder.name, scorers.fingerprint(config), *networks))
