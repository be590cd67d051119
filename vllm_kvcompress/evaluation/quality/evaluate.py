"""The `vllm-kvcompress eval` command: what each method and budget costs in quality, in the real engine."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vllm_kvcompress import __version__
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.evaluation import options, report
from vllm_kvcompress.evaluation.host import cache_groups, checkpoint, context_limit, engine_dtype
from vllm_kvcompress.evaluation.pictures import MODES
from vllm_kvcompress.evaluation.quality import retrieval
from vllm_kvcompress.evaluation.quality.samples import Sample, opening
from vllm_kvcompress.evaluation.quality.texts import CHARACTERS, KINDS
from vllm_kvcompress.evaluation.quality.texts import documents as documents_of_kinds
from vllm_kvcompress.evaluation.store import Store
from vllm_kvcompress.evaluation.variants import (
    EVERY_PROMPT,
    FULL,
    STOCK,
    Variant,
    baselines,
    behind,
    max_model_len,
    served_by,
    split_methods,
    variants,
)

KL_TASKS = ("kl_prose", "kl_repeat")
KL_KINDS = "kl_kinds"
RETRIEVAL = [task for task in retrieval.TASKS if task != "turns"]
SUITES = ("longbench", "ruler", "harness")
KL_CUE = 24  # tokens of the repeated passage that the prompt gives away
STEP_BATCH, STEPS = 4, 12
STEP_ROOM = 4 * STEPS + 64  # tokens that requests whose steps are timed may output
OTHER_SEED = 1000  # beside what a scorer is trained on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    positive = options.at_least(1)
    parser.add_argument("model", nargs="?", help="checkpoint folder; SmolLM2-135M-Instruct when not given")
    parser.add_argument(
        "--methods",
        default="streaming_llm,snapkv,adakv,kv_compress",
        help="comma-separated; options as in METHOD:NAME=VALUE,NAME=VALUE",
    )
    parser.add_argument(
        "--baselines",
        default="",
        help="stock vLLM with a quantized cache as further rows: comma-separated --kv-cache-dtype, as fp8",
    )
    parser.add_argument(
        "--budgets",
        type=options.fractions,
        default="0.5,0.25,0.125",
        help="fractions of the KV bytes that may stay",
    )
    parser.add_argument(
        "--tasks",
        default="retrieval,kl",
        help=f"of {', '.join(['retrieval', 'kl', *retrieval.TASKS, *KL_TASKS])}, {KL_KINDS} (passages of "
        "documents of several kinds, repeated), longbench[:NAME+NAME] or "
        "ruler[:NAME+NAME] (with --data), harness:NAME+NAME (tasks of lm-evaluation-harness)",
    )
    parser.add_argument(
        "--lengths", type=options.counts(1), default="512,1024,2048", help="document lengths in tokens"
    )
    parser.add_argument("--repetitions", type=positive, default=2, help="documents of each length")
    parser.add_argument("--kl-tokens", type=positive, default=64, help="tokens of each true continuation")
    parser.add_argument(
        "--modes",
        type=options.among(tuple(MODES)),
        default=",".join(MODES),
        help="where questions are asked: inside the prompt, or after its compression",
    )
    parser.add_argument(
        "--text", type=options.text_file, help="prose to build documents of; Jane Austen's Persuasion"
    )
    parser.add_argument(
        "--data", type=options.data_folder, help="folder of LongBench's or RULER's files, or of task files"
    )
    parser.add_argument("--limit", type=positive, default=20, help="samples per LongBench or RULER task")
    parser.add_argument(
        "--kvpress",
        action="store_true",
        help="set methods as kvpress has them and run it on the same prompts",
    )
    parser.add_argument("--block-size", type=positive, default=32, help="tokens per KV block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=options.result_folder, help="folder of results; a run that finds its own goes on"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, write results and pictures, print the table."""
    methods, budgets = split_methods(arguments.methods), arguments.budgets
    rows = _kvpress_variants(methods, budgets) if arguments.kvpress else variants(methods, budgets)
    lengths = arguments.lengths
    rows += baselines(arguments.baselines)
    tasks = _tasks(arguments.tasks)
    model = checkpoint(arguments.model)
    settings = {
        "model": str(model),
        "variants": [variant.spec for variant in rows],
        "tasks": arguments.tasks,
        "modes": arguments.modes,
        "lengths": lengths,
        "repetitions": arguments.repetitions,
        "kl_tokens": arguments.kl_tokens,
        "text": str(arguments.text or "persuasion"),
        "data": str(arguments.data),
        "limit": arguments.limit,
        "block_size": arguments.block_size,
        "seed": arguments.seed,
        "version": __version__,
    }
    folder = arguments.output or Path("kvcompress-eval") / Path(model).name
    store = Store(folder / "results.jsonl", settings)
    begin = time.perf_counter()
    own = [task for task in tasks if not task.startswith("harness:")]
    tables, samples = [], []
    if own:
        work = Work.of(arguments, model, own, lengths, rows)
        if work.too_long:
            print(work.left_out(), file=sys.stderr)
        samples = work.samples
        _measure(arguments, model, work, rows, store)
        settings |= {"context": work.limit, "too_long": work.too_long}
        settings |= {"argv": sys.argv, "seconds": round(time.perf_counter() - begin), **_machine()}
        summary = report.summarise(settings, rows, store.results)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        tables.append(report.table(summary))
        report.draw(summary, folder)
    if own != tasks:
        tables.append(
            _harness([t.partition(":")[2] for t in tasks if t not in own], arguments, model, rows, folder)
        )
    if arguments.kvpress:
        tables.append(_kvpress_table(arguments, model, methods, budgets, samples, store, folder))
    (folder / "table.md").write_text("\n".join(tables))
    print("\n".join(tables))
    print(f"{time.perf_counter() - begin:.0f} s; results, tables and pictures are in {folder}")


@dataclass(frozen=True)
class Work:
    """What is asked and measured, all of it within the model's context.

    Attributes:
        documents: of the retrieval tasks and of the divergences.
        samples: questions, in the order in which they are asked.
        texts: true continuations.
        limit: tokens of the model's context.
        length: tokens that the longest of them takes.
        too_long: what was left out, with the tokens that it would take.
    """

    documents: list[retrieval.Document]
    samples: list[Sample]
    texts: list[dict[str, Any]]
    limit: int
    length: int
    too_long: dict[str, int]

    @classmethod
    def of(
        cls, arguments, model, tasks: Sequence[str], lengths: list[int], rows: Sequence[Variant]
    ) -> "Work":
        """Make and read everything.

        Raises:
            KVCompressionError: it cannot be made, or all of it is longer than the model's context.
        """
        tokenizer = _tokenizer(model)
        prose = arguments.text.read_text(encoding="utf-8") if arguments.text else retrieval.default_prose()
        limit = context_limit(model)
        room = behind(row.spec for row in rows if not row.spec.startswith(STOCK))
        documents = retrieval.documents(tokenizer, lengths, arguments.repetitions, prose, arguments.seed)
        samples = [s for document in documents for s in document.samples if s.task in tasks]
        samples += _benchmark_samples(tasks, arguments, tokenizer, limit, room)
        texts = [
            _continuation(tokenizer, document, task, arguments.kl_tokens)
            for document in documents
            for task in KL_TASKS
            if task in tasks
        ]
        if KL_KINDS in tasks:
            texts += _texts_of_kinds(tokenizer, lengths, arguments)
        needs = {sample.id: _tokens_of(sample, tokenizer, room) for sample in samples}
        needs |= {text["id"]: len(text["prompt"]) + max(len(text["tokens"]), room) for text in texts}
        fitting = {name: tokens for name, tokens in needs.items() if tokens <= limit}
        work = cls(
            documents,
            [sample for sample in samples if sample.id in fitting],
            [text for text in texts if text["id"] in fitting],
            limit,
            max(fitting.values(), default=0),
            {name: tokens for name, tokens in needs.items() if tokens > limit},
        )
        if not fitting:
            raise KVCompressionError(f"{work.left_out()}; nothing remains: lower --lengths")
        return work

    def left_out(self) -> str:
        """One line that names what was left out."""
        return report.too_long(self.too_long, self.limit)


def _measure(arguments, model, work: Work, rows: list[Variant], store: Store) -> None:
    """Fill the store."""
    from tqdm import tqdm

    from vllm_kvcompress.evaluation.engine import Engine

    stock = [row for row in rows if row.spec.startswith(STOCK)]
    ours = [row for row in rows if row not in stock]
    specs = [row.spec for row in ours]
    room = max(STEP_ROOM, behind(specs))
    length = min(work.limit, work.length + room)
    references: dict[str, Any] = {}  # of the full cache, for engines that cannot serve it

    def steps(engine, rows: list[Variant], later: list[Variant]) -> Iterator[tuple[str, Callable[[], None]]]:
        # Everything about one document together, whose prefill is then computed once.
        for document in [*(document.text for document in work.documents), None]:
            for sample in work.samples:
                if sample.document == document or (document is None and sample.document not in own):
                    for mode in arguments.modes:
                        yield f"{sample.id} {mode}", partial(_ask, engine, sample, mode, rows, store)
            for text in work.texts:
                if text["text"] == document:
                    yield text["id"], partial(_diverge, engine, text, rows, later, store, references)
        prompt = opening(engine.tokenizer, work.documents[-1].text)[: max(1, length - room)]
        for row in rows:
            yield f"decode time {row.spec}", partial(_time_step, engine, prompt, row, store)

    def measure(engine, *rows: list[Variant]) -> None:
        with tqdm(list(steps(engine, *rows)), smoothing=0.05) as bar:
            for name, step in bar:
                bar.set_description(name)
                step()

    own = {document.text for document in work.documents}
    try:
        most, config = max_model_len(length, work.limit, specs), served_by(specs)
        measure(Engine(model, most, arguments.block_size, config=config), ours, stock)
        for row in stock:
            blocks = STEP_BATCH * -(-length // arguments.block_size) * cache_groups(model) + 1
            dtype = row.spec.removeprefix(STOCK)
            engine = Engine(model, length, arguments.block_size, dtype, num_gpu_blocks_override=blocks)
            measure(engine, [row], [])
    except KeyboardInterrupt:
        print("interrupted: what was measured is reported; the same command goes on", file=sys.stderr)


def _kvpress_variants(methods: Sequence[str], budgets: Sequence[float]) -> list[Variant]:
    """The full cache, then each method set as kvpress has it."""
    from vllm_kvcompress.evaluation.quality.kvpress_baseline import matching_config

    rows = [Variant(FULL)]
    for method in methods:
        for budget in budgets:
            try:
                flat = matching_config(method, budget).to_dict()
            except KVCompressionError as error:
                raise KVCompressionError(f"--kvpress: {error}") from None
            options = ",".join(f"{k}={v}" for k, v in flat.items() if k not in ("method", "enabled"))
            rows.append(Variant(f"{method}:{options}", method, budget))
    return rows


def _kvpress_table(arguments, model, methods, budgets, samples, store: Store, folder: Path) -> str:
    """The same samples through kvpress on transformers, next to ours."""
    from vllm_kvcompress.evaluation.quality import kvpress_baseline as kvpress

    pairs = [("full", 1.0), *((method, budget) for method in methods for budget in budgets)]
    asked = [kvpress.Variant(mode, *pair) for pair in pairs for mode in arguments.modes]
    compared = kvpress.compare(model, samples, asked, arguments.block_size, engine_dtype())
    (folder / "kvpress.json").write_text(json.dumps(compared, indent=1))
    specs = dict(zip(pairs, (row.spec for row in _kvpress_variants(methods, budgets)), strict=True))
    ours: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, result in store.results.items():
        if key[0] == "ask":
            ours.setdefault((key[3], key[2]), []).append(result)
    return report.kvpress_table(compared["variants"], specs, ours, Path(str(model)).name)


def _time_step(engine, prompt: list[int], row: Variant, store: Store) -> None:
    if (key := ("step", row.spec)) not in store:
        seconds = engine.step_seconds(prompt, row.spec, STEP_BATCH, STEPS)
        if seconds is not None:
            store.add(key, seconds=seconds, context=len(prompt), batch=STEP_BATCH)


def _ask(engine, sample: Sample, mode: str, rows: list[Variant], store: Store) -> None:
    """One sample under every variant: the full cache first, whose blocks the others find cached."""
    from vllm_kvcompress.evaluation.engine import Ask

    document = opening(engine.tokenizer, sample.document)
    question = engine.tokenizer.encode(sample.question, add_special_tokens=False)
    prompt, forced = (document + question, ()) if mode == "inside" else (document, question)
    missing = [row for row in rows if ("ask", sample.id, mode, row.spec) not in store]
    for group in ([r for r in missing if r.spec == FULL], [r for r in missing if r.spec != FULL]):
        asks = [Ask(prompt, row.spec, forced, None, sample.max_tokens, sample.stop) for row in group]
        begin = time.perf_counter()
        for row, outcome in zip(group, engine.run(asks), strict=True):
            store.add(
                ("ask", sample.id, mode, row.spec),
                task=sample.task,
                length=sample.length,
                depth=sample.depth,
                score=sample.metric(outcome.text, sample.answers),
                text=outcome.text,
                kept_fraction=outcome.kept_fraction,
                kept_bytes=outcome.kept_fraction / engine.cache_fraction * len(prompt) * engine.token_bytes,
                compaction_seconds=outcome.compaction_seconds,
                prompt_tokens=len(prompt),
                seconds=time.perf_counter() - begin,
            )


def _diverge(
    engine,
    text: dict[str, Any],
    rows: list[Variant],
    later: list[Variant],
    store: Store,
    references: dict[str, Any],
) -> None:
    """KL divergence and surprise of every row on one text.

    The full cache's log-probabilities are left among the references, for rows that come later.
    """
    from vllm_kvcompress.evaluation.engine import Ask, Divergence, Reference

    unmeasured = [row for row in rows + later if ("kl", text["id"], row.spec) not in store]
    if not unmeasured:
        return
    missing = [row for row in unmeasured if row in rows]
    begin = time.perf_counter()
    if not engine.stock:
        references[text["id"]] = Reference()
        engine.run([Ask(text["prompt"], FULL, text["tokens"], references[text["id"]])])
    prefill = time.perf_counter() - begin
    recorders = [Divergence(references[text["id"]], text["tokens"]) for _ in missing]
    asks, kept = {}, {FULL: 1.0}
    for row, recorder in zip(missing, recorders, strict=True):
        if row.spec == FULL:  # against itself
            for position, logits in references[text["id"]].rows.items():
                recorder(position, logits)
        else:
            asks[row.spec] = Ask(text["prompt"], row.spec, text["tokens"], recorder)
    kept |= {
        spec: outcome.kept_fraction
        for spec, outcome in zip(asks, engine.run(list(asks.values())), strict=True)
    }
    for row, recorder in zip(missing, recorders, strict=True):
        after = [position for position in sorted(recorder.kl) if position > 0]
        store.add(
            ("kl", text["id"], row.spec),
            task=text["task"],
            length=text["length"],
            **({"kind": text["kind"]} if "kind" in text else {}),
            kl=[round(recorder.kl[p], 6) for p in after],
            surprise=[round(recorder.surprise[p], 6) for p in after],
            agrees=[int(recorder.agrees[p]) for p in after],
            kept_fraction=kept[row.spec],
            seconds=prefill,
        )


def _continuation(tokenizer, document: retrieval.Document, task: str, count: int) -> dict[str, Any]:
    """A prompt with its true continuation: the prose goes on, or a passage of the prompt is repeated."""
    prompt = opening(tokenizer, document.text)
    if task == "kl_prose":
        tokens = tokenizer.encode(document.continuation, add_special_tokens=False)
    else:
        at = len(prompt) // 3
        tokens = prompt[at + KL_CUE :]
        prompt = prompt + prompt[at : at + KL_CUE]
    # One more than is measured: the first token is sampled before the prompt is compacted.
    return {
        "text": document.text,
        "task": task,
        "id": f"{task}/{document.name}",
        "prompt": prompt,
        "tokens": tokens[: count + 1],
        "length": document.length,
    }


def _texts_of_kinds(tokenizer, lengths: Sequence[int], arguments) -> list[dict[str, Any]]:
    """A passage repeated of documents of every kind that `texts` has, at every length."""
    made = []
    for length in lengths:
        number = len(KINDS) * arguments.repetitions
        sources = documents_of_kinds(number, CHARACTERS * length, arguments.seed + OTHER_SEED)
        for index, source in enumerate(sources):
            kind = list(KINDS)[index % len(KINDS)]
            cut = tokenizer.decode(tokenizer.encode(source, add_special_tokens=False)[:length])
            name = f"{kind}/{length}/{index // len(KINDS)}"
            document = retrieval.Document(name, cut, "", length, [])
            text = _continuation(tokenizer, document, KL_KINDS, arguments.kl_tokens)
            made.append(text | {"kind": kind, "text": None})
    return made


def _benchmark_samples(
    tasks: Sequence[str], arguments, tokenizer, max_tokens: int, room: int
) -> list[Sample]:
    """LongBench's and RULER's samples; too long documents lose their middle, as LongBench prescribes."""
    from vllm_kvcompress.evaluation.quality import longbench, ruler

    made: list[Sample] = []
    for task in tasks:
        suite, _, names = task.partition(":")
        if suite not in ("longbench", "ruler"):
            continue
        if arguments.data is None:
            raise KVCompressionError(f"{suite} needs --data FOLDER with its files")
        load = {"longbench": longbench, "ruler": ruler}[suite].load
        for sample in load(arguments.data, names.split("+") if names else None, arguments.limit):
            made.append(_shortened(sample, tokenizer, max_tokens, room))
    return made


def _shortened(sample: Sample, tokenizer, max_tokens: int, room: int) -> Sample:
    """A sample whose document, question and answer take no more than so many tokens, if that can be."""
    from vllm_kvcompress.evaluation.quality.longbench import truncate_middle

    excess = _tokens_of(sample, tokenizer, room) - max_tokens
    tokens = tokenizer.encode(sample.document, add_special_tokens=False)
    keep, cut = len(tokens), sample
    # Text that was cut may have more tokens than were left of it.
    while excess > 0 and keep > excess:
        keep -= excess
        cut = replace(sample, document=tokenizer.decode(truncate_middle(tokens, keep)))
        excess = _tokens_of(cut, tokenizer, room) - max_tokens
    return cut


def _tokens_of(sample: Sample, tokenizer, room: int) -> int:
    """Tokens of a sample, its answer included, or what must be left behind its prompt where that is more."""
    question = tokenizer.encode(sample.question, add_special_tokens=False)
    return len(opening(tokenizer, sample.document)) + len(question) + max(sample.max_tokens, room)


def _harness(tasks: Sequence[str], arguments, model, rows: list[Variant], folder: Path) -> str:
    """A table of lm-evaluation-harness's tasks under every variant."""
    from vllm_kvcompress.evaluation.quality import harness

    settings = {
        row.spec: {} if row.spec == FULL else EVERY_PROMPT.for_request(row.spec).engine_kwargs()
        for row in rows
    }
    options = {"dtype": engine_dtype(), "enforce_eager": True, "block_size": arguments.block_size}
    names = [name for task in tasks for name in task.split("+")]
    results = harness.run(str(model), names, settings, arguments.limit, options, arguments.data)
    (folder / "harness.json").write_text(json.dumps(results, indent=1))
    lines = [
        f"| {variant} | {task} | {metric} | {measured} |"
        for variant, by_task in results.items()
        for task, metrics in by_task.items()
        for metric, measured in metrics.items()
    ]
    return "\n".join(["| variant | task | metric | value |", "| --- | --- | --- | --- |", *lines]) + "\n"


def _tasks(given: str) -> list[str]:
    groups = {"retrieval": RETRIEVAL, "kl": list(KL_TASKS)}
    known = [*retrieval.TASKS, *KL_TASKS, KL_KINDS]
    tasks: list[str] = []
    for task in filter(None, given.split(",")):
        for name in groups.get(task, [task]):
            if name not in known and name.partition(":")[0] not in SUITES:
                raise KVCompressionError(
                    f"unknown task {name!r}; use {', '.join([*groups, *known, *SUITES])}"
                )
            tasks.append(name)
    if not tasks:
        raise KVCompressionError(f"--tasks names none; use {', '.join([*groups, *known, *SUITES])}")
    return tasks


def _tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model))


def _machine() -> dict[str, Any]:
    import torch
    import vllm

    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
