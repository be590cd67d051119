"""Compacted prefixes of models some of whose layers slide a window, attend within chunks or keep states.

Who attaches also goes on from what these layers see at the prefix's end.
"""

from dataclasses import replace

import pytest
import torch
from harness import NUM_BLOCKS, STATEFUL, exact, first_difference, sampling, tokens
from pinned import from_token, overwrite, pin, save_and_drop
from saving import outcome

from vllm_kvcompress import load_prefix, prefix_files, save_prefix
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.paging.manager import CompactingManager
from vllm_kvcompress.paging.statistics import TAKEN
from vllm_kvcompress.requests.saved import read, write

# Of "padded" vLLM has the layers of full attention in three groups.
KINDS = ["gemma3", "llama4", "padded", "gpt-oss", "lfm2", "qwen3-next"]
STARTED = STATEFUL | {"padded": dict(max_model_len=2048)}
OPTIONS, METHOD = "snapkv:budget=0.25,prefix_share=0.6", "knorm:budget=0.25"


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def sharing(engines, hybrids, stateful, kind):
    """Afterwards no prefix is left, and all blocks of all groups are given back."""
    engine = engines((hybrids | stateful)[kind], OPTIONS, **STARTED.get(kind, {}))
    engine.scheduler._prefixes.keeps_unnamed = False
    engine.forget_prefixes()
    engine.compactions.clear(), engine.outputs.clear()
    free = engine.free
    yield engine
    for prefix in list(engine.scheduler._prefixes):
        engine.scheduler._prefixes.drop(prefix)
    engine.check_accounts(), engine.check_nothing_left()
    assert engine.free == free and not engine.worker.compression.prefixes


@pytest.fixture
def in_float32(kind) -> None:
    """In bfloat16 the same tokens computed in other steps have other answers."""
    if kind == "qwen3-next":
        pytest.skip("vLLM's CPU build has gated delta networks in bfloat16 alone")


def contents(sharing, manager, blocks) -> list[torch.Tensor]:
    """What layers of a group have in blocks."""
    context = sharing.worker.compilation_config.static_forward_context
    config, ids = sharing.scheduler.kv_cache_config, [block.block_id for block in blocks]
    found = []
    for name in config.kv_cache_groups[manager.kv_cache_group_id].layer_names:
        cache = context[name].kv_cache
        for tensor in [cache] if isinstance(cache, torch.Tensor) else cache:
            found.append(tensor.movedim(tensor.shape.index(config.num_blocks), 0)[ids].clone())
    assert found
    return found


def others_of(sharing) -> list:
    """The managers of groups that are not compacted."""
    return [manager for manager in sharing.managers if not isinstance(manager, CompactingManager)]


def document_of(sharing, long_ids, rest: int, seed: int) -> list[int]:
    size = sharing.manager.block_size
    return long_ids(-(-600 // size) * size + rest, seed=seed)


@pytest.mark.parametrize("rest", [0, 1, 17])
def test_a_prefix_holds_what_other_layers_saw_at_its_end(sharing, long_ids, rest):
    """To the last bit as with a raw request of the same prompt."""
    document = document_of(sharing, long_ids, rest, seed=2)
    prefix, _ = pin(sharing, document, METHOD)
    live = sharing.live(sharing.add(document, sampling(3, "off")))
    while live.num_computed_tokens < len(document):
        sharing.step()
    for manager, seen in zip(others_of(sharing), prefix.beside, strict=True):
        end = len(document) // sharing.manager.block_size * sharing.manager.block_size // manager.block_size
        raw = manager.req_to_blocks[live.request_id][end - len(seen) : end]
        assert len(seen) > 0 and not {block.block_id for block in seen} & {block.block_id for block in raw}
        pairs = zip(contents(sharing, manager, seen), contents(sharing, manager, raw), strict=True)
        assert all(torch.equal(one, other) and one.count_nonzero() for one, other in pairs)
    sharing.finish()
    sharing.outputs.clear()


@pytest.mark.parametrize("method", [METHOD, "snapkv:budget=0.25"])
def test_who_attaches_goes_on_as_the_one_that_was_compacted_there(
    sharing, attachments, long_ids, in_float32, method
):
    document = document_of(sharing, long_ids, 0, seed=3)
    size = sharing.manager.block_size
    prefix, alone = pin(sharing, document, method, max_tokens=80)
    said, free = tokens(alone), sharing.free
    names = [sharing.add(document + said[:n], sampling(80 - n, method)) for n in (40, 45)]
    sharing.step()
    assert attachments == [(name, len(document) // size) for name in names]
    sharing.check_accounts()
    sharing.finish()
    for n, name in zip((40, 45), names, strict=True):
        answer = sharing.outputs.pop(name)
        difference = first_difference(answer, from_token(alone, n), gap=2e-3)
        assert difference is None or difference > 3
    assert prefix.hits == 2 and sharing.free == free and len(sharing.compactions) == 1


def test_a_prefix_that_is_deleted_while_it_is_read_stays_whole_for_its_readers(sharing, long_ids):
    document, suffix = document_of(sharing, long_ids, 5, seed=5), long_ids(40, seed=12)
    prefix, _ = pin(sharing, document, METHOD)
    expected = sharing.run(document + suffix, sampling(60, METHOD))
    name = sharing.add(document + suffix, sampling(60, METHOD))
    sharing.step()
    sharing.scheduler._prefixes.drop(prefix)
    sharing.check_accounts()
    other = sharing.add(long_ids(2000, seed=21), sampling(20, "off"))  # writes what is free
    sharing.finish()
    assert first_difference(sharing.outputs.pop(name), expected) is None
    sharing.outputs.pop(other)


def test_who_is_preempted_attaches_again(sharing, attachments, long_ids, in_float32):
    document, suffix = document_of(sharing, long_ids, 5, seed=6), long_ids(40, seed=13)
    pin(sharing, document, METHOD)
    expected = sharing.run(document + suffix, sampling(40, METHOD))
    name = sharing.add(document + suffix, sampling(40, METHOD))
    for _ in range(8):
        sharing.step()
    live = sharing.live(name)
    sharing.scheduler.running.remove(live)
    sharing.scheduler._preempt_request(live, 0.0)
    sharing.check_accounts()
    sharing.finish()
    assert len(attachments) == 3
    assert first_difference(sharing.outputs.pop(name), expected, gap=2e-3) is None


def test_a_conversation_goes_on_from_its_last_turn(sharing, attachments, long_ids, monkeypatch):
    monkeypatch.setattr(sharing.scheduler._prefixes, "keeps_unnamed", True)
    size, prompt = sharing.manager.block_size, document_of(sharing, long_ids, 9, seed=7)
    for turn in range(3):
        output = sharing.run(prompt, sampling(size // 2 + 20, METHOD))
        sharing.check_accounts()
        sharing.pool.evict_blocks({block.block_id for block in sharing.pool.blocks if not block.ref_cnt})
        assert len(attachments) == turn
        if turn:
            assert len(prompt) - attachments[-1][1] * size < 2 * size + 50
        prompt = prompt + tokens(output) + long_ids(30, seed=30 + turn)


def test_nobody_attaches_to_a_part(sharing, attachments, long_ids):
    document = document_of(sharing, long_ids, 0, seed=8)
    pin(sharing, document, METHOD)
    other = list(document)
    other[-1] += 1
    sharing.run(other + [5, 6], sampling(2, METHOD))
    sharing.run(document, sampling(2, METHOD))
    assert not attachments


# ---------------------------------------------------------------------- saved


def taken(sharing) -> tuple:
    """What a refused file must leave as it is."""
    return sharing.free, len(sharing.scheduler._prefixes), len(sharing.worker.compression.read)


def refused(sharing, path) -> str:
    """The one line by which a file is not loaded."""
    before = taken(sharing)
    with pytest.raises(KVCompressionError) as error:
        load_prefix(sharing.llm, path)
    assert "\n" not in str(error.value) and taken(sharing) == before
    return str(error.value)


@pytest.mark.parametrize("method", [METHOD, "snapkv+k4v3:budget=0.25"])
def test_a_saved_prefix_is_loaded_and_answers_the_same_to_the_last_bit(
    sharing, attachments, long_ids, method, tmp_path
):
    document, suffix = document_of(sharing, long_ids, 17, seed=9), long_ids(40, seed=14)
    prefix, _ = pin(sharing, document, method)
    others = others_of(sharing)
    held = [contents(sharing, *each) for each in zip(others, prefix.beside, strict=True)]
    expected = sharing.run(document + suffix, sampling(40, method))
    again = sharing.run(document + suffix + tokens(expected), sampling(30, method))
    save_and_drop(sharing, tmp_path / "document")
    overwrite(sharing)
    free, num = sharing.free, len(attachments)
    load_prefix(sharing.llm, tmp_path / "document")
    (prefix,) = sharing.scheduler._prefixes
    assert sharing.free == free - len(prefix.blocks)
    # Attached to in the very step in which it is loaded.
    name = sharing.add(document + suffix, sampling(40, method))
    sharing.step()
    assert len(attachments) == num + 1
    sharing.check_accounts()
    for manager, seen, before in zip(others, prefix.beside, held, strict=True):
        found = contents(sharing, manager, seen)
        assert all(torch.equal(one, other) for one, other in zip(found, before, strict=True))
    sharing.finish()
    assert exact(sharing.outputs.pop(name)) == exact(expected)
    answer = sharing.run(document + suffix + tokens(expected), sampling(30, method))
    assert len(attachments) == num + 2 and exact(answer) == exact(again)
    save_prefix(sharing.llm, "document", tmp_path / "again")
    one, other = (read(str(tmp_path / name)) for name in ("document", "again"))
    assert one.about == other.about and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_an_engine_that_is_started_again_answers_as_the_one_before(
    sharing, engines, hybrids, stateful, kind, long_ids, tmp_path
):
    """With a pool of another size, and so of other places."""
    document, suffix = document_of(sharing, long_ids, 5, seed=10), long_ids(40, seed=15)
    pin(sharing, document, METHOD)
    expected = sharing.run(document + suffix, sampling(40, METHOD))
    save_and_drop(sharing, tmp_path / "document")
    options = STARTED.get(kind, {}) | dict(num_gpu_blocks_override=NUM_BLOCKS + 71)
    again = engines((hybrids | stateful)[kind], OPTIONS, **options)
    free = again.free
    load_prefix(again.llm, tmp_path / "document")
    (prefix,) = again.scheduler._prefixes
    assert exact(again.run(document + suffix, sampling(40, METHOD))) == exact(expected)
    assert prefix.hits == 1
    for prefix in list(again.scheduler._prefixes):
        again.scheduler._prefixes.drop(prefix)
    again.check_accounts(), again.check_nothing_left()
    assert again.free == free


def test_what_does_not_fit_is_refused_in_one_line_and_takes_nothing(sharing, long_ids, tmp_path, monkeypatch):
    document, path = document_of(sharing, long_ids, 0, seed=11), tmp_path / "document"
    prefix, _ = pin(sharing, document, METHOD)
    save_prefix(sharing.llm, "document", path)
    assert refused(sharing, path) == TAKEN
    sharing.scheduler._prefixes.drop(prefix)
    whole, (group, *_) = read(str(path)), sharing.worker.compression.beside
    name = next(iter(group.caches))

    def changed(tensors=(), **about) -> str:
        """Of a file that is other than it was."""
        own = {**whole.tensors, **dict(tensors)}
        own = {key: each for key, each in own.items() if each is not None}
        return refused(sharing, write(str(path), own, {**whole.about, **about}))

    damaged, seen = "is damaged: its tensors are not what they should be", whole.tensors[name]
    assert changed({name: None}).endswith(damaged)
    assert changed({name: seen[:-1].clone()}).endswith(damaged)
    assert changed({name: torch.cat([seen, seen])}).endswith(damaged)
    assert changed({name: seen.to(torch.float64)}).endswith(damaged)
    assert changed({name: seen.flatten(1)[:, 1:].clone()}).endswith(damaged)
    size = sharing.manager.block_size
    assert "is of blocks of 16 tokens; use --block-size 16" in changed(block_size=16)
    assert "its description is not what it should be" in changed(boundary=whole.about["boundary"] - 1)
    longer = torch.cat([whole.tensors["tokens"], torch.ones(size, dtype=torch.int64)])
    assert "is damaged: " in changed({"tokens": longer})
    # Groups that are alike but for what a block is.
    monkeypatch.setattr(sharing.worker.compression, "beside", [replace(group, layout="another")])
    assert "is of another model" in changed()
    monkeypatch.undo()
    with sharing.squeezed(leave=len(prefix.blocks) - 1):
        num = len(prefix.blocks)
        assert refused(sharing, path).endswith(f"takes {num} blocks, and {num - 1} are free")
    load_prefix(sharing.llm, path)


def test_a_folder_brings_them_back(sharing, attachments, long_ids, tmp_path, monkeypatch):
    core = sharing.llm.llm_engine.engine_core.engine_core
    document = document_of(sharing, long_ids, 3, seed=12)
    ours = replace(sharing.scheduler.compression, prefix_folder=str(tmp_path))
    monkeypatch.setattr(sharing.scheduler, "compression", ours)
    prefix, _ = pin(sharing, document, METHOD)
    core.kv_compression_save_prefix("ticket", "document")
    assert outcome(lambda: core.kv_compression_prefix_saved("ticket")) is None
    sharing.scheduler._prefixes.drop(prefix)
    prefix_files.load_folder(core)
    sharing.run(document + [5, 6, 7], sampling(3, METHOD))
    assert len(attachments) == 1
    assert core.kv_compression_delete_prefix("document", None) and not list(tmp_path.iterdir())
