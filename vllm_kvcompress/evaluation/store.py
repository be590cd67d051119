"""Results on disk, written as they come, so that a run can go on where it was ended."""

import contextlib
import json
from pathlib import Path
from typing import Any

from vllm_kvcompress.config import KVCompressionError


class Store:
    """Results as JSON lines, in the order they were made; what is there is not measured again.

    The first line holds the settings. A run with other settings is refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[tuple[str, ...], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else [json.dumps(settings)]
        if json.loads(lines[0]) != settings:
            raise KVCompressionError(
                f"{path} holds results of other settings; choose another --output or remove it"
            )
        for line in lines[1:]:
            with contextlib.suppress(json.JSONDecodeError):  # the line during which an earlier run was ended
                result = json.loads(line)
                self.results[tuple(result["key"])] = result
        path.write_text("".join(json.dumps(entry) + "\n" for entry in [settings, *self.results.values()]))

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self.results

    def add(self, key: tuple[str, ...], **values: Any) -> None:
        self.results[key] = {"key": list(key), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(self.results[key]) + "\n")
