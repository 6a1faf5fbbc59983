"""The work folder ``OUT.partial/``: what a killed compression left, and how the next run goes on from it.

    manifest.json     what is compressed how: source fingerprint, config, calibration fingerprint, version
    lock              held (flock) by the run at work
    parts/NAME.safetensors   one finished layer: its tensors, and its `Measurement` in the metadata
    hidden/           hidden states that memory has no room for; of no use to another run
    result/           the finished model being put together; renamed to OUT as the last step

Every file appears complete or not at all, so whatever bears its final name can be trusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from llava_fa.config import format_size
from llava_fa.errors import FourierError, disk_errors
from llava_fa.hub.report import Measurement
from llava_fa.hub.shards import Entry, Item, file_metadata, read_header, write_file, write_text

_MANIFEST = "manifest.json"


class Parts:
    """Finished layers, a file each.

    Args:
        folder: where they are; it may not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.parts = folder

    def part(self, name: str) -> Path:
        """The file of a layer, finished or not."""
        return self.parts / f"{name}.safetensors"

    def __contains__(self, name: str) -> bool:
        return self.part(name).is_file()

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], measurement: Measurement) -> None:
        """Keep one finished layer."""
        metadata = {"measurement": json.dumps(measurement)}
        with disk_errors(self.parts):
            write_file(self.part(name), [Item.of(key, value.cpu()) for key, value in tensors.items()], metadata)

    def entries(self, name: str) -> dict[str, Entry]:
        """The tensors of a finished layer, by tensor name."""
        return read_header(self.part(name))[0]

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished layer, in memory."""
        return {key: entry.read() for key, entry in self.entries(name).items()}

    def measurement(self, name: str) -> Measurement:
        """What was measured when the layer was compressed."""
        return Measurement(*json.loads(file_metadata(self.part(name))["measurement"]))


class WorkFolder(Parts):
    """The work folder of one output folder, locked for this process while open (use as a context manager).

    Args:
        out: the output folder; it must not exist.
        manifest: JSON-able description of the work; a left-over folder is taken up only if its own is equal.
        fresh: throw a left-over folder away.

    Raises:
        FourierError: ``out`` exists, another run is at work, the left-over is of other work, not writable.
    """

    def __init__(self, out: Path, manifest: Mapping[str, Any], fresh: bool = False) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        super().__init__(self.path / "parts")
        self.result, self.hidden = self.path / "result", self.path / "hidden"
        self._manifest = json.loads(json.dumps(manifest))
        self._fresh = fresh

    def __enter__(self) -> WorkFolder:
        refuse_existing(self.out)
        with disk_errors(self.path), contextlib.ExitStack() as lock:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire(lock.enter_context(open(self.path / "lock", "a")))
            if self._fresh:
                self._clear()
            self._check_manifest()
            self.parts.mkdir(exist_ok=True)
            for left in (self.result, self.hidden):
                shutil.rmtree(left, ignore_errors=True)
            self._lock = lock.pop_all()  # held from here on
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _acquire(self, lock: TextIO) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FourierError(
                "another run is compressing to this folder",
                remedy="Wait for it, or give another OUT",
                where=str(self.out),
            ) from None

    def _clear(self) -> None:
        """Remove all but the lock; the manifest last, since parts without it could not be gone on with."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == _MANIFEST):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _check_manifest(self) -> None:
        path = self.path / _MANIFEST
        if not path.exists():
            if self.parts.exists():
                raise FourierError(
                    "it holds parts but no manifest",
                    remedy="Give --fresh to start over",
                    where=str(self.path),
                )
            write_text(path, json.dumps(self._manifest, indent=1))
            return
        try:
            manifest = json.loads(path.read_text())
        except ValueError:
            manifest = {}
        if changed := _differences(manifest, self._manifest):
            raise FourierError(
                f"an unfinished compression with another {', '.join(changed)} is there",
                remedy="Give --fresh to throw it away, the former arguments to resume it, or another OUT",
                where=str(self.path),
            )

    def replace(self, name: str, by: str) -> None:
        """Let the finished layer ``by`` take the place of ``name``."""
        with disk_errors(self.path):
            os.replace(self.part(by), self.part(name))

    def write_json(self, name: str, value: Any) -> None:
        """Keep what was measured or decided, so that a resumed run ends with the same."""
        with disk_errors(self.path):
            write_text(self.path / name, json.dumps(value))

    def read_json(self, name: str) -> Any:
        """What `write_json` kept under this name; None where nothing was."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self) -> None:
        """Give the finished result its name and remove the work folder."""
        with disk_errors(self.path):
            refuse_existing(self.out)
            os.rename(self.result, self.out)
            self._clear()
            shutil.rmtree(self.path, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raise `FourierError` if the output folder exists: nothing is ever overwritten."""
    if out.exists() or out.is_symlink():
        raise FourierError("it exists already", remedy="Give a new folder, or remove this one", where=str(out))


def check_space(path: Path, needed: int) -> None:
    """Raise `FourierError` unless the disk of ``path`` has ``needed`` bytes."""
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < needed:
        raise FourierError(
            f"the disk has {format_size(free)} free, and about {format_size(needed)} are needed",
            remedy="Free some space, or give an OUT on another disk",
            where=str(path),
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += [f"{key}.{inner}" for inner in _differences(old, new)]
        elif old != new:
            changed.append(key)
    return changed
