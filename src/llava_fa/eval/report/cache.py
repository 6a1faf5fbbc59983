"""What took long to measure, kept until the report is written, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_fa.data.textfiles import read_json
from llava_fa.errors import disk_errors
from llava_fa.hub.shards import write_text
from llava_fa.hub.source import resolve_model, weight_files


def fingerprint(model: str) -> str:
    """Tells a model folder from any other, and from itself after a change: configuration, sizes and times of files."""
    folder = resolve_model(model)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        status = path.stat()
        digest.update(f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode())
    return digest.hexdigest()


class Cache:
    """JSON values by what they depend on, one file each in a folder that is made when the first is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, what: str, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The value kept under ``what`` and ``key``, or, where there is none, what ``measure`` gives now."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{what}-{name}.json"
        if path.is_file():
            return read_json(path, "Remove it: it is measured again")
        value = json.dumps(measure())
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, value)
        return json.loads(value)
