"""Files that are written beside the steps appear whole, or not at all."""

import resource
import threading

import pytest
import torch
from saving import outcome

from vllm_kvcompress.requests import saved
from vllm_kvcompress.worker.saving import Saver

ABOUT = {"name": "document", "kept": 0.25}


def tensors(value: int, num_bytes: int = 1 << 20) -> dict[str, torch.Tensor]:
    return {"compacted": torch.full((num_bytes // 64, 64), value, dtype=torch.uint8)}


@pytest.fixture
def small_disk():
    """Files may have no more than 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_there_once_it_is_said_to_be_and_not_before(tmp_path, blocked):
    saver, path = Saver(), tmp_path / "document"
    saver.begin(str(path), tensors(3), ABOUT)
    assert saver.outcome() == (False, None) and not list(tmp_path.iterdir())
    blocked.set()
    assert outcome(saver.outcome) is None
    assert [each.name for each in tmp_path.iterdir()] == ["document"]
    assert path.stat().st_mode & 0o777 == 0o600
    found = saved.read(str(path))
    assert found.about.items() >= ABOUT.items()
    assert torch.equal(found.tensors["compacted"], tensors(3)["compacted"])


def test_what_was_there_stays_whole_where_the_new_one_cannot_be_written(tmp_path, small_disk):
    saver, path = Saver(), tmp_path / "document"
    saver.begin(str(path), tensors(3, 1 << 12), ABOUT)
    assert outcome(saver.outcome) is None
    saver.begin(str(path), tensors(4), ABOUT)
    problem = outcome(saver.outcome)
    assert problem is not None and problem.startswith(f"cannot write {path}: ") and "\n" not in problem
    assert [each.name for each in tmp_path.iterdir()] == ["document"]
    assert saved.read(str(path)).tensors["compacted"].unique().tolist() == [3]
    saver.begin(str(path), tensors(5, 1 << 12), ABOUT)
    assert outcome(saver.outcome) is None, "of the one before nothing is left"
    assert saved.read(str(path)).tensors["compacted"].unique().tolist() == [5]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    saver, path = Saver(), tmp_path / "missing" / "document"
    saver.begin(str(path), tensors(3), ABOUT)
    assert outcome(saver.outcome) == f"cannot write {path}: No such file or directory"


def test_what_is_deleted_while_it_is_written_does_not_appear(tmp_path, blocked):
    saver, path = Saver(), tmp_path / "document"
    saver.begin(str(path), tensors(3), ABOUT)
    saver.forget(str(tmp_path / "another"))
    saver.forget(str(path))
    blocked.set()
    assert outcome(saver.outcome) == "it was deleted meanwhile" and not list(tmp_path.iterdir())
    for forgets in (True, False):
        saver.begin(str(path), tensors(4), ABOUT)
        assert outcome(saver.outcome) is None and path.exists()
        if forgets:  # too late: it is there
            saver.forget(str(path))


def test_an_error_that_nobody_thought_of_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "write", lambda *args: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # which writes to the log
    saver, path = Saver(), tmp_path / "document"
    saver.begin(str(path), tensors(3), ABOUT)
    assert outcome(saver.outcome) == f"cannot write {path}; see the server's log"
