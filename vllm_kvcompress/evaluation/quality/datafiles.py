"""The files of benchmarks, which may not be here. Each absence is one clear line."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.config import KVCompressionError


class DataMissing(KVCompressionError):
    """A benchmark's file is not there; the message names the file and where to get it."""


def records(path: Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, each checked to have the fields.

    Raises:
        KVCompressionError: a line is not a JSON object, a field is absent, or there are no lines.
    """
    number = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):  # noqa: B007
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise KVCompressionError(f"{path}, line {number}: not a JSON object")
            if absent := [field for field in fields if field not in record]:
                raise KVCompressionError(f"{path}, line {number}: no field {', '.join(absent)}")
            yield record
    if not number:
        raise KVCompressionError(f"{path} is empty")
