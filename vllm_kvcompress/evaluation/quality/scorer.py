"""Trains a scorer: the part of `vllm-kvcompress calibrate` behind `--scorer`.

Documents are compressed by `kvzip` in an engine, which repeats each and so scores its tokens. The scorer
learns to tell these scores from the keys and values that the cache holds.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_kvcompress import __version__, scorers
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation.host import checkpoint, context_limit, model_config
from vllm_kvcompress.evaluation.quality import texts
from vllm_kvcompress.evaluation.variants import ROOM
from vllm_kvcompress.scorers import Scorer

TEACHER = "kvzip:budget=0.5"
LEAST = 1e-6  # scores below it are as good as none
BATCH, RATE, DECAY = 256, 1e-3, 1e-2
EMPHASIS = 0.5  # on tokens that score well: budgets choose among those
EIGHTH = 8


def run(arguments: argparse.Namespace) -> None:
    """Train a scorer, and say how well it tells what it has not seen."""
    model = checkpoint(arguments.model)
    number, tokens = arguments.scorer_documents, arguments.tokens
    if 2 * tokens + ROOM > (limit := context_limit(model)):
        raise KVCompressionError(
            f"documents of {tokens} tokens are repeated, and twice that is beyond the context of {limit}; "
            "lower --tokens"
        )
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from vllm_kvcompress.evaluation import pictures
    from vllm_kvcompress.evaluation.host import require

    require("matplotlib", pictures.EXTRA)  # rather now than after minutes of training
    name, begin = Path(model).name, time.monotonic()
    folder = arguments.output or Path("kvcompress-calibrate") / name
    folder.mkdir(parents=True, exist_ok=True)
    own_text = arguments.data.read_text(encoding="utf-8") if arguments.data else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = texts.documents(number, texts.CHARACTERS * tokens, arguments.seed, own_text)
    prompts = [tokenizer.encode(text)[:tokens] for text in made]
    if min(map(len, prompts)) < tokens:
        raise KVCompressionError(f"the text is too short for documents of {tokens} tokens; lower --tokens")
    lessons = collect(model, prompts, folder / "lessons", tqdm)
    held_out = max(1, min(number // 4, len(texts.KINDS)))
    with tqdm(total=lessons[0].num_layers, desc="training layers") as bar:
        scorer, loss, found = train(
            lessons, held_out, arguments.width, arguments.epochs, arguments.seed, bar.update
        )
    config = model_config(model).hf_text_config
    record = {
        "teacher": TEACHER,
        "documents": number,
        "held_out": held_out,
        "tokens": tokens,
        "text": arguments.data.name if arguments.data else list(texts.KINDS),
        "width": arguments.width,
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "unexplained": [[round(value, 3) for value in row] for row in loss.tolist()],
        "best_eighth_found": round(found, 4),
        "package": __version__,
    }
    scorer = Scorer(
        name, scorers.fingerprint(config), scorer.up, scorer.up_bias, scorer.down, scorer.down_bias, record
    )
    path = folder / f"{scorers.name_of(model)}.safetensors"
    scorers.write(path, scorer)
    cached = scorers.cache_folder() / path.name
    cached.parent.mkdir(parents=True, exist_ok=True)
    scorers.write(cached, scorer)
    for lesson in lessons:
        lesson.path.unlink()
    title = f"{name}: what a scorer cannot tell of KVzip's scores"
    pictures.unexplained_by_head(loss.tolist(), folder / "scorer.png", title)
    print(f"{number - held_out} documents of {tokens} tokens learned from, {held_out} held out")
    print(f"share of the log scores' variance that is not explained: median {float(loss.median()):.2f}")
    print(f"KVzip's own best eighth of a document's tokens, heads and layers together, found: {found:.1%}")
    print(f"scorer and picture are in {folder}, {time.monotonic() - begin:.0f} s")
    print(f"engines of {name} find it in {cached}; use --kv-compression foresight:budget=0.25")


# ---------------------------------------------------------------------- what is learned from


@dataclass(frozen=True)
class Lesson:
    """What one document teaches, in a file: of every layer, tokens' keys and values and their scores."""

    path: Path
    num_layers: int

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs `[H, n, 2D]` and log scores `[H, n]`, float32."""
        with safe_open(self.path, "pt") as file:
            return tuple(file.get_tensor(f"{part}.{index}").float() for part in ("inputs", "scores"))


def collect(model: str, prompts: Sequence[Sequence[int]], folder: Path, tqdm: Any) -> list[Lesson]:
    """Have each prompt scored by the engine's own repetition; those that are in the folder already are kept.

    Returns:
        One lesson of each prompt.
    """
    from vllm_kvcompress.evaluation.engine import Ask, Engine

    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        folder / f"{index:03}-{_digest(model, prompt)}.safetensors" for index, prompt in enumerate(prompts)
    ]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    if missing:
        longest = max(map(len, prompts))
        engine = Engine(model, 2 * longest + ROOM)
        watch = _Watch(engine.compactor)
        for index in tqdm(missing, desc="repeating documents"):
            engine.run([Ask(prompts[index], TEACHER, max_tokens=2, ignore_eos=True)])
            tensors = {}
            for layer, (inputs, scores) in enumerate(watch.taken):
                tensors[f"inputs.{layer}"] = inputs.to(torch.bfloat16).contiguous()
                tensors[f"scores.{layer}"] = scores.clamp(min=LEAST).log().contiguous()
            unfinished = paths[index].with_suffix(".part")
            save_file(tensors, unfinished)
            unfinished.replace(paths[index])
    with safe_open(paths[0], "pt") as file:
        layers = len(file.keys()) // 2
    return [Lesson(path, layers) for path in paths]


def _digest(model: str, prompt: Sequence[int]) -> str:
    return hashlib.sha256(f"{model} {TEACHER} {list(prompt)}".encode()).hexdigest()[:12]


class _Watch:
    """Takes what a compaction looks at: keys and values of its request, and the policy's state."""

    def __init__(self, compactor: Any) -> None:
        self.compactor, self.taken = compactor, []
        self._run = compactor.run
        compactor.run = self.run

    def run(self, works: Sequence[Any]) -> Any:
        (work,) = works
        cache, job = self.compactor.cache, work.job
        self.taken = []
        raw = cache.on_device(job.raw)
        for index, (attention, state) in enumerate(
            zip(self.compactor.layers, work.observed.states, strict=True)
        ):
            own = slice(index, index + 1)
            pages = cache.context(own, None, raw)
            width = state.shape[1]
            keys, values = (read(pages, own)[:, :width] for read in (cache.read_keys, cache.read_values))
            if attention.rotary is None:
                raise KVCompressionError("a scorer needs rotary position embeddings, which a layer has not")
            keys = attention.rotary.undo(keys.transpose(0, 1), 0).transpose(0, 1)
            inputs = torch.cat([keys, values.float()], 2)
            self.taken.append((inputs.cpu(), state.float().cpu().clone()))
        return self._run(works)


# ---------------------------------------------------------------------- learning


def train(
    lessons: Sequence[Lesson],
    held_out: int,
    width: int,
    epochs: int,
    seed: int,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[Scorer, Tensor, float]:
    """Train every layer's networks, layer by layer.

    Args:
        lessons: the last `held_out` of them are not learned from.
        held_out: at least 1.
        width: M, hidden units.
        epochs: passes over the lessons.
        seed: of the first weights and the order.
        progress: called after each layer.

    Returns:
        The scorer without a name, the share of the held-out log scores' variance that it leaves unexplained,
        `[L, H]`, and how much of the held-out documents' best eighth it finds.
    """
    parts, losses, told, meant = [], [], [], []
    for layer in range(lessons[0].num_layers):
        shown = [lesson.layer(layer) for lesson in lessons]
        inputs, scores = (torch.cat(part, 1) for part in zip(*shown[:-held_out], strict=True))
        part = fit(inputs, scores, width, epochs, seed + layer)
        parts.append(part)
        own = Scorer("", "", *(tensor[None] for tensor in part))
        size = inputs.shape[2] // 2
        answers = [own.log_scores((0,), 0, x[..., :size], x[..., size:]) for x, _ in shown[-held_out:]]
        wanted = [y for _, y in shown[-held_out:]]
        answer, want = torch.cat(answers, 1), torch.cat(wanted, 1)
        losses.append((answer - want).square().mean(1) / want.var(1, unbiased=False).clamp(min=1e-6))
        told.append(answers)
        meant.append(wanted)
        progress()
    found = []
    for document in range(held_out):
        answer, want = (torch.cat([layer[document] for layer in of], 0).flatten() for of in (told, meant))
        count = len(answer) // EIGHTH
        best = torch.zeros(len(answer), dtype=torch.bool).index_fill_(0, want.topk(count).indices, True)
        found.append(float(best[answer.topk(count).indices].float().mean()))
    scorer = Scorer("", "", *(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    return scorer, torch.stack(losses), sum(found) / len(found)


def fit(
    inputs: Tensor, scores: Tensor, width: int, epochs: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least squares of one layer's standardised log scores z, every head by itself.

    A token weighs exp(EMPHASIS·z).

    Args:
        inputs: `[H, n, 2D]` float32.
        scores: `[H, n]` float32, logarithms.
        width: M.
        epochs: passes.
        seed: of weights and order.

    Returns:
        `up [H, 2D, M]`, `up_bias [H, M]`, `down [H, M]`, `down_bias [H]`, with the standardisation in them.
    """
    draw = torch.Generator().manual_seed(seed)
    heads, number, size = inputs.shape
    mean, deviation = inputs.mean(1, keepdim=True), inputs.std(1, keepdim=True) + 1e-5
    centre, spread = scores.mean(1, keepdim=True), scores.std(1, keepdim=True) + 1e-5
    x, y = (inputs - mean) / deviation, (scores - centre) / spread
    weight = (EMPHASIS * y).exp()
    weight /= weight.mean(1, keepdim=True)
    up = (torch.randn(heads, size, width, generator=draw) / math.sqrt(size)).requires_grad_()
    up_bias = torch.zeros(heads, 1, width, requires_grad=True)
    down = (torch.randn(heads, width, 1, generator=draw) / math.sqrt(width)).requires_grad_()
    down_bias = torch.zeros(heads, 1, 1, requires_grad=True)
    weights = [up, up_bias, down, down_bias]
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=DECAY)
    steps = epochs * math.ceil(number / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for some in torch.randperm(number, generator=draw).split(BATCH):
                hidden = torch.nn.functional.gelu(torch.baddbmm(up_bias, x[:, some], up))
                answer = torch.baddbmm(down_bias, hidden, down)[..., 0]
                loss = ((answer - y[:, some]).square() * weight[:, some]).mean(1).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    up, up_bias, down, down_bias = (weight.detach() for weight in weights)
    folded = up / deviation.transpose(1, 2)
    bias = up_bias[:, 0] - (mean @ folded)[:, 0]
    return folded, bias, down[..., 0] * spread, down_bias[:, 0, 0] * spread[:, 0] + centre[:, 0]
