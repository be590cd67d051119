"""What kernels add up beside the pages is read, moved and left alone as the policies' own states would be."""

import torch

from vllm_kvcompress.policies import POLICIES
from vllm_kvcompress.policies.criticalkv import CriticalKV
from vllm_kvcompress.policies.h2o import H2O
from vllm_kvcompress.policies.knorm import Knorm
from vllm_kvcompress.policies.watching import AttentionSum
from vllm_kvcompress.requests.cache import Kept
from vllm_kvcompress.requests.sums import PageSums


def test_sums_go_where_their_tokens_go_also_to_pages_that_are_read():
    sums = PageSums(torch.arange(160.0).view(40, 4))
    pages = torch.tensor([[-1, 5, 6], [7, 8, 9]])
    assert sums.read(pages)[0, 4:].tolist() == list(range(20, 28))
    assert sums.read(pages)[1].tolist() == list(range(28, 40))
    columns = torch.tensor([[5, 6, 8, 11], [0, 1, 10, 11]])
    sums.move(Kept(pages, torch.tensor([0, 1]), columns), torch.tensor([7, 30]))
    assert sums.by_page[7].tolist() == [21, 22, 24, 27] and sums.by_page[30].tolist() == [28, 29, 38, 39]
    assert sums.by_page[6].tolist() == [24, 25, 26, 27]


def test_nothing_is_added_while_a_request_is_paused_and_no_span_notes_it(observer):
    observer.sums = PageSums.empty(observer.cache.grid, torch.device("cpu"))
    for name, policy in (("h", H2O()), ("k", POLICIES["kv_compress_full"]()), ("n", Knorm())):
        observer.watch(name, policy)
    assert [observer.adds(name) for name in "hknx"] == ["attention", "squares", None, None]
    observer.pause("h")
    assert observer.adds("h") == "nothing"
    observer.resume("h")
    assert observer.adds("h") == "attention"
    assert not observer.notes("hkn")
    bounds, seq_lens = torch.tensor([0, 1, 2]), torch.tensor([5, 5])
    assert observer.spans(["h", "k"], bounds, seq_lens, torch.zeros(2, 2).long()) == []
    observer.forget("h")
    assert observer.adds("h") is None


def test_without_a_place_for_sums_spans_note_what_accumulates(observer):
    assert observer.sums is None
    observer.watch("h", H2O())
    assert observer.adds("h") is None and observer.notes("h")


def test_what_observes_in_a_way_of_its_own_is_not_added_up_in_its_place():
    class Halved(AttentionSum):
        squared = False

        def observe(self, observation):
            return super().observe(observation) / 2

    assert Halved().sums is None and CriticalKV(Halved()).sums is None
    assert CriticalKV(H2O()).sums == "attention" and CriticalKV().sums is None
    assert all(policy().sums is None or policy().accumulates for policy in POLICIES.values())
