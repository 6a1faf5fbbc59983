"""Killed at any moment, a compression resumes, and ends with the very bytes of an uninterrupted run."""

import errno
import json
import os
import signal
import sys

import pytest
import torch

import llava_fa
from llava_fa import FourierError
from llava_fa.hub import shards, work_folder
from llava_fa.maths.trellis import trellis_points

LAYERS = 28


def die_at(name: str, at: int, *args) -> int:
    """Run `compress` in a child process that kills itself (SIGKILL) in its ``at``-th call of ``os.<name>``.

    ``fsync`` comes when a file is written and has no name yet, ``replace`` is done when it has one.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    # A fork leaves torch's thread pool to be made anew by who asks first; threads loading weights would race for it.
    torch.set_num_threads(torch.get_num_threads())
    true, calls = getattr(os, name), 0

    def deadly(*values):
        nonlocal calls
        true(*values)
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        setattr(os, name, deadly)
        llava_fa.compress(*args)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)  # it should have died before


@pytest.mark.parametrize(
    ("name", "at", "finished"),
    [
        ("fsync", 1, 0),  # writing the manifest
        ("fsync", 2, 0),  # writing the first part
        ("replace", 2, 1),  # the first part has its name
        ("fsync", 12, 10),
        ("replace", 1 + LAYERS, LAYERS),  # the last part has its name
        ("fsync", 2 + LAYERS, LAYERS),  # writing the result's weights
        ("replace", 3 + LAYERS, LAYERS),  # the result is complete, without its final name
    ],
)
def test_killed_without_calibration(checkpoint, quick, compressed, tmp_path, digest, name, at, finished):
    out = tmp_path / "out"
    assert die_at(name, at, checkpoint, out, quick) == signal.SIGKILL
    assert not out.exists()
    seen = []
    llava_fa.compress(checkpoint, out, quick, progress=seen.append)
    assert seen[0].resumed == finished
    assert digest(out) == digest(compressed[0])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("name", "at"), [("replace", 3), ("fsync", 15), ("replace", 20)])
def test_killed_with_calibration(checkpoint, quick, samples, calibrated, tmp_path, digest, name, at):
    """Within a stage, between stages, in the projector, in the language model."""
    out = tmp_path / "out"
    assert die_at(name, at, checkpoint, out, quick, samples) == signal.SIGKILL
    llava_fa.compress(checkpoint, out, quick, samples)
    assert digest(out) == digest(calibrated[0])


def test_killed_twice(checkpoint, quick, compressed, tmp_path, digest):
    out = tmp_path / "out"
    assert die_at("fsync", 6, checkpoint, out, quick) == signal.SIGKILL
    assert die_at("replace", 5, checkpoint, out, quick) == signal.SIGKILL
    llava_fa.compress(checkpoint, out, quick)
    assert digest(out) == digest(compressed[0])


@pytest.fixture
def interrupted(checkpoint, quick, tmp_path):
    """An output folder whose compression stopped after three layers."""

    def stop(progress):
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llava_fa.compress(checkpoint, tmp_path / "out", quick, progress=stop)
    return tmp_path / "out"


def test_other_work_is_refused_by_name(checkpoint, quick, samples, interrupted):
    with pytest.raises(FourierError, match=r"another config\.bits, config\.rank is there\. Give --fresh"):
        llava_fa.compress(checkpoint, interrupted, quick.replace(bits=3, rank=1))
    with pytest.raises(FourierError, match="another calibration is there"):
        llava_fa.compress(checkpoint, interrupted, quick, samples)


def test_other_codebooks_are_refused(checkpoint, quick, interrupted, monkeypatch):
    """Those of another state of the package under one version: parts of both would be read by one of them."""
    monkeypatch.setattr("llava_fa.hub.compress.trellis_points", lambda bits: -trellis_points(bits))
    with pytest.raises(FourierError, match="another codebook is there"):
        llava_fa.compress(checkpoint, interrupted, quick)


def test_another_source_is_refused(checkpoint, quick, interrupted, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "initializer_range": 0.03}))
    with pytest.raises(FourierError, match="another source is there"):
        llava_fa.compress(other, interrupted, quick)


def test_fresh_starts_over(checkpoint, quick, compressed, interrupted, digest):
    seen = []
    llava_fa.compress(checkpoint, interrupted, quick.replace(bits=3), fresh=True, progress=seen.append)
    assert seen[0].resumed == 0
    assert seen[-1].done == LAYERS


def test_two_runs_at_once_are_refused(checkpoint, quick, interrupted):
    manifest = json.loads((interrupted.with_name("out.partial") / "manifest.json").read_text())
    with (
        work_folder.WorkFolder(interrupted, manifest),
        pytest.raises(FourierError, match="another run is compressing to this folder"),
    ):
        llava_fa.compress(checkpoint, interrupted, quick)


def test_a_full_disk_ends_in_one_error_and_resumes(checkpoint, quick, compressed, tmp_path, digest):
    out = tmp_path / "out"
    plans = []

    def fill(progress):
        if progress.done == 5 and progress.name:  # the next part's file lands on a device that is always full
            target = tmp_path / "out.partial" / "parts" / f"{progress.name}.safetensors.tmp"
            target.symlink_to("/dev/full")
            plans.append(target)

    with pytest.raises(FourierError, match=r"the disk is full\. Finished layers are kept.*same command"):
        llava_fa.compress(checkpoint, out, quick, progress=fill)
    assert not out.exists()
    plans[0].unlink()
    seen = []
    llava_fa.compress(checkpoint, out, quick, progress=seen.append)
    assert seen[0].resumed == 5
    assert digest(out) == digest(compressed[0])


def test_too_little_disk_is_said_before_the_work(checkpoint, quick, tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    assert usage.f_bavail > 0
    monkeypatch.setattr(work_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(FourierError, match=r"the disk has 1\.0 MB free, and about 64\.\d MB are needed"):
        llava_fa.compress(checkpoint, tmp_path / "out", quick)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_said(checkpoint, quick, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FourierError, match="cannot write there"):
        llava_fa.compress(checkpoint, tmp_path / "file" / "out", quick)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")  # root, who runs CI, is never refused

    monkeypatch.setattr(work_folder.Path, "mkdir", refuse)
    with pytest.raises(FourierError, match=r"cannot write there \(Permission denied\)\. Give an OUT in a folder"):
        llava_fa.compress(checkpoint, tmp_path / "out", quick)


def test_an_existing_output_is_never_touched(checkpoint, quick, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FourierError, match="it exists already"):
        llava_fa.compress(checkpoint, tmp_path / "out", quick)
    assert list((tmp_path / "out").iterdir()) == []


def test_writing_is_all_or_nothing(tmp_path):
    def body(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        shards.write_atomically(tmp_path / "file", body)
    assert not (tmp_path / "file").exists()
