"""The `vllm-kvcompress calibrate` command: measure which KV heads of a model need many tokens, which few.

The result is a head profile, for `--kv-compression METHOD:allocation=profile:PATH`.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress import __version__, profiles
from vllm_kvcompress.allocation import Profile, Uniform, select
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.evaluation import options
from vllm_kvcompress.evaluation.host import checkpoint
from vllm_kvcompress.evaluation.quality import retrieval, scorer
from vllm_kvcompress.evaluation.quality.probe import Probe
from vllm_kvcompress.evaluation.quality.samples import opening
from vllm_kvcompress.policies import Policy

CHECKED = 2  # further documents, on which the profile is compared with even shares
RESOLUTION = 32  # steps in which a head's share is raised from zero to the mean
LEAST = 4  # of these steps, what every head keeps: other text may need it more than the calibration text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `calibrate`."""
    parser.add_argument("model", nargs="?", help="checkpoint folder; SmolLM2-135M-Instruct when not given")
    parser.add_argument("--policy", default="snapkv", help="whose scores choose the tokens that a head keeps")
    positive = options.at_least(1)
    parser.add_argument(
        "--data", type=options.text_file, help="text, a paragraph a line; Jane Austen's Persuasion"
    )
    parser.add_argument("--documents", type=positive, default=4, help="documents that are measured")
    parser.add_argument("--tokens", type=positive, default=1024, help="length of each document")
    parser.add_argument("--continuation", type=positive, default=64, help="tokens that follow each document")
    parser.add_argument("--fractions", default="0.02,0.08,0.3", help="kept fractions that are measured")
    parser.add_argument("--budgets", default="0.5,0.25,0.125,0.0625", help="mean budgets of the profile")
    parser.add_argument("--batch", type=positive, default=8, help="variants that are computed at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=options.result_folder, help="folder of the results")
    learning = parser.add_argument_group("a scorer instead of a profile", "for the method `foresight`")
    learning.add_argument("--scorer", action="store_true", help="train a scorer")
    learning.add_argument("--scorer-documents", type=options.at_least(2), default=56, help="to learn from")
    learning.add_argument("--width", type=positive, default=64, help="hidden units of a head's network")
    learning.add_argument("--epochs", type=positive, default=25, help="passes over the documents")


def run(arguments: argparse.Namespace) -> None:
    """Measure, write the profile and the picture, and compare the profile with even shares."""
    if arguments.scorer:
        scorer.run(arguments)
        return
    keeping = Keeping.of(arguments.policy)
    fractions, budgets = _fractions(arguments.fractions), _fractions(arguments.budgets)
    model = checkpoint(arguments.model)
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from vllm_kvcompress.evaluation import pictures
    from vllm_kvcompress.evaluation.host import require

    require("matplotlib", pictures.EXTRA)  # rather now than after minutes of measuring
    texts = calibration_texts(AutoTokenizer.from_pretrained(model), arguments)
    measured, further = texts[: arguments.documents], texts[arguments.documents :]
    probe = Probe.load(model)
    steps = math.ceil(probe.num_layers * probe.num_kv_heads * len(fractions) / arguments.batch)
    with tqdm(total=len(measured) * steps, desc="measuring heads") as bar:
        curves = [
            sensitivity(probe, text, keeping, fractions, arguments.batch, bar.update) for text in measured
        ]
    curve = torch.stack(curves).mean(0)
    shares = torch.stack([head_shares(curve, fractions, budget) for budget in budgets])

    name = Path(model).name
    folder = arguments.output or Path("kvcompress-calibrate") / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile.json"
    given = ("documents", "tokens", "continuation", "seed")
    settings: dict[str, Any] = {option: getattr(arguments, option) for option in given}
    settings |= {"data": arguments.data.name if arguments.data else "persuasion", "package": __version__}
    profiles.write(path, name, arguments.policy, budgets, shares, fractions, curve, settings)
    title = f"{name}, {arguments.policy}: cost of one head keeping few tokens"
    pictures.head_sensitivity(curve.permute(2, 0, 1).tolist(), fractions, folder / "sensitivity.png", title)
    print(f"KL divergence to the full cache, nats/token, on {len(further)} documents that were not measured")
    print(f"{'budget':>8}{'even':>10}{'profile':>10}{'median share':>15}{'heads with half':>18}")
    for budget, even, own in compare(probe, further, keeping, budgets, path):
        shown = shares[budgets.index(budget)].flatten()
        half = int((shown.sort(descending=True).values.cumsum(0) < shown.sum() / 2).sum()) + 1
        ratio = f"{half} of {len(shown)}"
        print(f"{budget:>8g}{even:>10.4f}{own:>10.4f}{shown.median():>15.2f}{ratio:>18}")
    print(f"profile and picture are in {folder}; use --kv-compression METHOD:allocation=profile:{path}")


# ---------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Text:
    """A document and what follows it, in tokens."""

    document: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Keeping:
    """How a head chooses the tokens that it keeps.

    Attributes:
        policy: scores tokens.
        sinks: first tokens, kept always.
        recent: last tokens, kept always and not counted.
    """

    policy: Policy
    sinks: int
    recent: int

    @classmethod
    def of(cls, method: str) -> "Keeping":
        """As a method would.

        Raises:
            KVCompressionError: it is none, or it needs more of a request than its keys and last queries.
        """
        config = KVCompressionConfig.parse(method)
        policy = config.build_policy()
        needs_more = policy.accumulates or policy.repeats or policy.needs_rotary
        if needs_more or type(policy).refine is not Policy.refine:
            raise KVCompressionError(f"calibration cannot score with {method}; use --policy snapkv")
        return cls(policy, config.sink_tokens, config.recent_tokens)

    def scores(self, probe: Probe) -> Tensor:
        """Scores of the prompt that a probe holds, `[L, H, T]` float32; +inf for the sinks."""
        num_scored = probe.context[0].keys.shape[1] - self.recent
        if num_scored <= self.sinks:
            raise KVCompressionError(
                f"a document of {num_scored + self.recent} tokens has none that may go; raise --tokens"
            )
        scores = probe.scores(self.policy, num_scored)
        scores[..., : self.sinks] = torch.inf
        return scores


def calibration_texts(tokenizer: Any, arguments: argparse.Namespace) -> list[Text]:
    """Documents with hidden facts, followed half by more of the prose, half by a passage of their own.

    Prose alone would say little of the heads that look things up in the context.
    """
    prose = arguments.data.read_text(encoding="utf-8") if arguments.data else retrieval.default_prose()
    number = arguments.documents + CHECKED
    texts = []
    for document in retrieval.documents(tokenizer, [arguments.tokens], number, prose, arguments.seed):
        tokens = opening(tokenizer, document.text)
        half = arguments.continuation // 2
        onwards = tokenizer.encode(document.continuation, add_special_tokens=False)[:half]
        begin = len(tokens) // 3
        again = tokens[begin : begin + arguments.continuation - len(onwards)]
        texts.append(Text(tokens, onwards + again))
    return texts


def sensitivity(
    probe: Probe, text: Text, keeping: Keeping, fractions: Sequence[float], batch: int = 8, progress=None
) -> Tensor:
    """What it costs that one head keeps a fraction of its tokens while all others keep theirs.

    The cost is the KL divergence from the full cache's next-token distribution, the mean over the text's
    continuation: the rise of the log-perplexity that the full cache's own choice of tokens would see, and far
    less noisy than the rise on the few tokens of one true text.

    Args:
        probe: the model.
        text: what it reads.
        keeping: how the head chooses its tokens.
        fractions: of the tokens that may go.
        batch: variants at once.
        progress: called after each batch.

    Returns:
        `[L, H, fractions]` float64, nats per token.
    """
    probe.read(text.document)
    scores = keeping.scores(probe)
    layers, heads, num_scored = scores.shape
    kept = []
    for fraction in fractions:
        count = max(1, keeping.sinks, round(fraction * num_scored))
        kept.append(kept_tokens(scores, torch.full((layers, heads), count), len(text.document)))
    full = torch.ones_like(kept[0])
    reference = probe.continue_with(text.continuation, full[None])
    cost = torch.empty(layers, heads, len(fractions), dtype=torch.float64)
    variants = [tuple(index) for index in torch.ones_like(cost).nonzero().tolist()]
    for begin in range(0, len(variants), batch):
        some = variants[begin : begin + batch]
        masks = full.repeat(len(some), 1, 1, 1)
        for mask, (layer, head, index) in zip(masks, some, strict=True):
            mask[layer, head] = kept[index][layer, head]
        found = divergence(reference, probe.continue_with(text.continuation, masks))
        for variant, value in zip(some, found.tolist(), strict=True):
            cost[variant] = value
        if progress is not None:
            progress()
    return cost


def kept_tokens(scores: Tensor, counts: Tensor, num_tokens: int) -> Tensor:
    """Which tokens of a prompt each head keeps: its best ones, and all that are not scored.

    Args:
        scores: `[L, H, T]`.
        counts: `[L, H]` int64, at least 1.
        num_tokens: C >= T.

    Returns:
        `[L, H, C]` bool.
    """
    kept = torch.ones(*counts.shape, num_tokens, dtype=torch.bool)
    kept[..., : scores.shape[-1]] = False
    head = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())
    kept.view(counts.numel(), -1)[head, select(scores, counts, 1).flatten()] = True
    return kept


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Mean KL divergence over a text, nats per token.

    Args:
        reference: `[1, K, V]` log-probabilities.
        other: `[B, K, V]`.

    Returns:
        `[B]`.
    """
    return (reference.exp() * (reference - other)).sum(-1).mean(-1).clamp(min=0)


def compare(
    probe: Probe, texts: Sequence[Text], keeping: Keeping, budgets: Sequence[float], path: Path
) -> Iterator[tuple[float, float, float]]:
    """KL divergence at each budget, with even shares and with the profile, all heads together."""
    found = []
    for text in texts:
        probe.read(text.document)
        scores = keeping.scores(probe)
        layers, heads, num_scored = scores.shape
        full = torch.ones(1, layers, heads, len(text.document), dtype=torch.bool)
        reference = probe.continue_with(text.continuation, full)
        for budget in budgets:
            total = layers * heads * max(1, keeping.sinks, round(budget * num_scored))
            masks = [
                kept_tokens(scores, allocation.allocate(scores, total, 1), len(text.document))
                for allocation in (Uniform(), Profile(str(path)))
            ]
            found.append(divergence(reference, probe.continue_with(text.continuation, torch.stack(masks))))
    means = torch.stack(found).view(len(texts), len(budgets), 2).mean(0)
    for budget, (even, own) in zip(budgets, means.tolist(), strict=True):
        yield budget, even, own


# ---------------------------------------------------------------------- from costs to shares


def head_shares(cost: Tensor, fractions: Sequence[float], budget: float) -> Tensor:
    """How a mean budget is best split, if the costs of the heads add up.

    Source: Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284, head budgets.

    Args:
        cost: `[L, H, fractions]`, nats per token.
        fractions: kept fractions, ascending.
        budget: mean kept fraction.

    Returns:
        `[L, H]` float64, relative to the mean: they sum to L·H.
    """
    losses = loss_table(cost.flatten(0, 1).double().numpy(), fractions, budget)
    counts = exchange(losses, RESOLUTION, LEAST)
    return torch.from_numpy(counts / RESOLUTION).view(cost.shape[:2])


def loss_table(cost: np.ndarray, fractions: Sequence[float], budget: float) -> np.ndarray:
    """Each head's loss at every share of the budget.

    The measured costs, with none at all where everything is kept, are made non-increasing by their envelope
    from above, and are linear in the logarithm of the fraction, also below the lowest one measured.

    Args:
        cost: `[heads, fractions]`.
        fractions: ascending, below 1.
        budget: mean kept fraction.

    Returns:
        `[heads, shares]` float64; column i is a share of i / RESOLUTION of the mean, column 0 is unusable.
    """
    envelope = np.maximum.accumulate(np.pad(cost, ((0, 0), (0, 1)))[:, ::-1], axis=1)[:, ::-1]
    known = np.log([*fractions, 1.0])
    wanted = np.log(np.arange(1, math.floor(RESOLUTION / budget + 1e-9) + 1) * budget / RESOLUTION)
    losses = np.full((len(cost), len(wanted) + 1), np.inf)
    for row, curve in zip(losses, envelope, strict=True):
        slope = (curve[1] - curve[0]) / (known[1] - known[0])
        row[1:] = np.interp(wanted, known, curve) + slope * np.minimum(wanted - known[0], 0)
    return losses


def exchange(losses: np.ndarray, start: int, least: int) -> np.ndarray:
    """From even counts on, move budget from the cheapest donor to the best receiver while it helps.

    Large amounts are moved first, then smaller ones: a head may need much at once to gain anything.

    Args:
        losses: `[heads, n]`, column i is the loss of i units.
        start: units of every head at first.
        least: units that every head keeps.

    Returns:
        `[heads]` int64 with the sum unchanged, and a sum of losses that is not above the first one.
    """
    heads, columns = losses.shape
    everyone = np.arange(heads)
    counts = np.full(heads, start)
    amount = start
    while amount := amount // 2:
        while True:
            now = losses[everyone, counts]
            less, more = counts - amount, counts + amount
            loss = np.where(less >= least, losses[everyone, np.maximum(less, least)] - now, np.inf)
            gain = np.where(more < columns, now - losses[everyone, np.minimum(more, columns - 1)], -np.inf)
            donor = int(loss.argmin())
            gain[donor] = -np.inf
            receiver = int(gain.argmax())
            if not gain[receiver] > loss[donor] + 1e-12:
                break
            counts[donor] -= amount
            counts[receiver] += amount
    return counts


def _fractions(given: str) -> list[float]:
    try:
        numbers = sorted({float(part) for part in given.split(",")})
    except ValueError:
        raise KVCompressionError(f"{given!r} is not a comma-separated list of fractions") from None
    if not 0 < numbers[0] <= numbers[-1] < 1:
        raise KVCompressionError(f"fractions must lie between 0 and 1, got {given}")
    return numbers
