"""Compacted prefixes that are written to files beside the steps."""

import threading
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from vllm_kvcompress.requests import saved


class Saver:
    """Writes one prefix at a time in a thread, which holds its bytes until it has ended.

    A process that ends waits for it. Where it is killed something unfinished is left beside the file, and
    what was there before is still whole.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._path: str | None = None  # that is being written, while it is wanted
        self._problem: str | None = None
        self._lock = threading.Lock()  # of the path

    def begin(self, path: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Begin to write a file (see `saved.write`); none is being written."""
        assert self.outcome()[0]
        self._path, self._problem = path, f"cannot write {path}; see the server's log"
        self._thread = threading.Thread(target=self._write, args=(path, tensors, about))
        self._thread.start()

    def refuse(self, problem: str) -> None:
        """Have this be the outcome of what was to be begun."""
        self._problem = problem

    def outcome(self) -> tuple[bool, str | None]:
        """Whether what was begun last has ended, and what was in its way, in one line."""
        if self._thread is not None and self._thread.is_alive():
            return False, None
        return True, self._problem

    def forget(self, path: str) -> None:
        """Have a file that is being written not appear."""
        with self._lock:
            if self._path == path:
                self._path = None

    def _write(self, path: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        try:
            unfinished = saved.write(path, tensors, about)
            try:
                with self._lock:
                    if self._path != path:
                        self._problem = "it was deleted meanwhile"
                        return
                    saved.publish(unfinished, path)
                    self._path = self._problem = None
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            self._problem = f"cannot write {path}: {error.strerror or error}"
        except SafetensorError as error:
            self._problem = f"cannot write {path}: {str(error).splitlines()[0]}"
