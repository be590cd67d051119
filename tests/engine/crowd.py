"""Many requests that come, are aborted and preempted, in a pool that is far too small."""

import random
import warnings
from dataclasses import dataclass

import torch
from harness import Engine, first_difference, sampling


@dataclass
class Member:
    """One request of the crowd.

    Attributes:
        steps_to_live: it is aborted after so many steps; None for never.
    """

    prompt: list[int]
    max_tokens: int
    samples: int
    compression: str | dict | None
    steps_to_live: int | None

    def params(self, samples: int = 1):
        # vLLM allows n > 1 only when it samples; the likeliest token alone to sample from is greedy again.
        several = dict(n=samples, temperature=1.0, top_k=1) if samples > 1 else {}
        return sampling(self.max_tokens, self.compression, **several)


def members_of_small_crowd(
    long_ids, options: list, number: int, lengths: tuple[int, int, int]
) -> dict[str, Member]:
    """So many requests, some with a common beginning, several samples or a short life; `lengths` of prompts:
    the least, the most and the usual."""
    random_ = random.Random(7)
    prefix, members = long_ids(200, seed=100), {}
    for index in range(number):
        length = int(random_.triangular(*lengths))
        prompt = long_ids(length, seed=200 + index)
        if random_.random() < 0.35:
            prompt = (prefix + prompt)[:length]
        members[f"crowd{index}"] = Member(
            prompt=prompt,
            max_tokens=random_.randint(8, 24),
            samples=2 if random_.random() < 0.1 else 1,
            compression=random_.choice(options),
            steps_to_live=random_.randint(0, 30) if random_.random() < 0.15 else None,
        )
    return members


@dataclass
class Run:
    members: dict[str, Member]
    outputs: dict
    compactions: list
    sent: list
    preemptions: int
    most_running: int
    free_before: int
    free_after: int


def serve(engine: Engine, members: dict[str, Member], pool: int, random_: random.Random) -> Run:
    """Members arrive a few at a time and are served to their end."""
    engine.forget_prefixes()
    engine.sent.clear(), engine.compactions.clear(), engine.outputs.clear()
    free, preemptions = engine.free, engine.preemptions
    waiting, ages, most_running = dict(members), {}, 0
    with engine.squeezed(pool):
        while waiting or engine.llm.llm_engine.has_unfinished_requests():
            for name in list(waiting)[: random_.choice([0, 0, 1, 2, 5])]:
                member = waiting.pop(name)
                engine.add(member.prompt, member.params(member.samples), name)
                ages[name] = 0
            for name, age in ages.items():
                if age == members[name].steps_to_live:
                    engine.llm.llm_engine.abort_request([name])
                ages[name] += 1
            engine.step()
            growing = [
                request
                for request in engine.scheduler.running
                if (tracked := engine.scheduler._tracked.get(request.request_id))
                and tracked.held is not None
                and (tracked.point is not None or tracked.config.when == "pressure")
            ]
            if growing and random_.random() < 0.08:  # as a full pool would, between two of its compactions
                victim = random_.choice(growing)
                engine.scheduler.running.remove(victim)
                engine.scheduler._preempt_request(victim, 0.0)
            engine.check_accounts()
            most_running = max(most_running, len(engine.scheduler.running))
        left = engine.free
    result = Run(
        members,
        dict(engine.outputs),
        list(engine.compactions),
        list(engine.sent),
        engine.preemptions - preemptions,
        most_running,
        pool,
        left,
    )
    assert engine.free == free
    print(
        f"{len(result.outputs)} of {len(members)} ended, {len(result.compactions)} compactions, "
        f"{result.preemptions} preemptions, {most_running} at once"
    )
    return result


def in_time(compactions: dict[str, list], engine) -> dict[str, list]:
    """Those of requests none of which went on raw: only their answers are what they are alone."""
    return {
        name: own
        for name, own in compactions.items()
        if not any(compaction.job.request_id in engine.late for compaction in own)
    }


def compacted(run: Run) -> dict[str, list]:
    """Compactions of the requests that ended, by request."""
    by_request: dict[str, list] = {}
    for compaction in run.compactions:
        if finished(run, compaction.request):
            by_request.setdefault(compaction.request, []).append(compaction)
    return by_request


def finished(run: Run, name: str) -> bool:
    output = run.outputs.get(name)
    return output is not None and all(sample.finish_reason == "length" for sample in output.outputs)


def compare(output, alone, differences: list, name: str) -> None:
    for sample in range(len(output.outputs)):
        index = first_difference(output, alone, sample)
        if index is not None:
            differences.append((name, sample, index))


def tolerate(differences: list, out_of: int) -> None:
    """Near-ties that float32 rounding decided differently are told, and must stay rare."""
    if differences:
        warnings.warn(f"near-ties decided differently (request, sample, token): {differences}", stacklevel=2)
    assert len(differences) <= out_of // 20


def compare_with_alone(
    run: Run, engine: Engine, chosen: list[str], differences: list, num_layers: int | None = None
) -> None:
    """Requests of the crowd against the same requests run alone: what the first layers keep, and outputs."""
    of_request = compacted(run)
    engine.compactions.clear()
    for name in chosen:
        member = run.members[name]
        alone = engine.run_fresh(member.prompt, member.params())
        references = {c.job.num_tokens: c for c in engine.compactions}
        engine.compactions.clear()
        for compaction in of_request[name]:
            reference = references[compaction.job.num_tokens]
            assert torch.equal(compaction.counts[:num_layers], reference.counts[:num_layers]), name
            assert compaction.positions()[:num_layers] == reference.positions()[:num_layers], name
        compare(run.outputs[name], alone, differences, name)
