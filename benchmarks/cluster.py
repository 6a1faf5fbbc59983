"""A compression over a cluster of Ray: how much sooner with two workers, and what bounds it with 8 and 64 GPUs.

    OMP_NUM_THREADS=1 .venv-ray/bin/python benchmarks/cluster.py measure FOLDER|tiny [-- OPTIONS OF COMPRESS]
    .venv/bin/python benchmarks/cluster.py table

*measure*: nodes of one CPU each as processes on this machine, first one, then two. What counts is the time of the whole
command, the start of Python on every worker included. The results must be equal to the byte.

*table*: by computation. What a stage sends is what `solver.statistics` holds, times shares and readers; rates are those
below, measured where docs/results.md says so, assumed where it says that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from llava_fa.hub.blocks import _STAGE_BYTES
from llava_fa.hub.shares import MOST, SHARE

TOKENS = 1024 * 1024
"""1024 samples of 1024 tokens: 64 shares."""
GPU, NETWORK, MEMORY = 40e12, 12.5e9, 10e9
"""Assumed: float32 operations a second; bytes a second into a node (100 Gbit/s) and through a core's additions."""
FIT, DRIFT, CUBE = 3.4e6, 8e6, 0.8 / 4096**3
"""Measured on 2 cores ("Speed of compression"): weights a second of feedback and of the drift, and seconds for each of
n³ in their factors (8 % of 5.4 s and 14 % of 2.5 s at n = 4096)."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Groups of layers that are fitted at the same time.

    Attributes:
        name: of the layers.
        n: their inputs.
        outputs: of each layer of a group.
        groups: how many of these there are.
        share: of all tokens, that comes to a group.
    """

    name: str
    n: int
    outputs: tuple[int, ...]
    groups: int = 1
    share: float = 1.0

    @property
    def group_bytes(self) -> int:
        """Of one share's sums of one group: half of the moment, and D or W D, in float64."""
        return 4 * self.n * (self.n + 512) + 8 * self.n * min(self.n, sum(self.outputs))

    def layer_seconds(self) -> float:
        """Of the largest layer on 2 cores."""
        weights = max(self.outputs) * self.n
        return weights / FIT + weights / DRIFT + CUBE * self.n**3

    def gather_seconds(self, block: int, workers: int) -> float:
        """Of the samples of one worker: the block twice on its GPU, the products, and their additions on its CPU."""
        tokens = TOKENS / min(workers, shares())
        products = self.groups * self.share * tokens * (self.n**2 + 2 * self.n * min(self.n, sum(self.outputs)))
        additions = self.groups * max(1.0, self.share * tokens / 4096) * 3 * self.group_bytes / MEMORY
        runs = -(-self.groups // max(1, _STAGE_BYTES // (16 * self.n**2)))
        return (4 * block * tokens * runs + products) / GPU + additions

    def bounds(self, block: int, workers: int) -> dict[str, float]:
        """Seconds of each thing that could bound the stage."""
        readers = min(len(self.outputs), workers)
        per_worker = max(1.0, self.groups * readers / workers)
        received = shares() * self.group_bytes * per_worker * (1 - 1 / workers)
        layers = self.groups * len(self.outputs)
        return {
            "samples": self.gather_seconds(block, workers),
            "network": received / NETWORK,
            "sums": shares() * per_worker * 3 * self.group_bytes / MEMORY,
            "fitting": -(-layers // workers) * self.layer_seconds(),
        }


def shares() -> int:
    return min(MOST, TOKENS // SHARE)


DENSE = [
    Stage("q, k, v", 3584, (3584, 512, 512)),
    Stage("o", 3584, (3584,)),
    Stage("gate, up", 3584, (18944, 18944)),
    Stage("down", 18944, (3584,)),
]
MIXTURE = [
    Stage("q, k, v", 2048, (4096, 512, 512)),
    Stage("o", 4096, (2048,)),
    Stage("128 gate, up", 2048, (1536,), 128, 8 / 128),
    Stage("128 down", 768, (2048,), 128, 8 / 128),
]
MODELS = {"Qwen2.5-VL-7B (28 blocks)": (DENSE, 233_000_000, 28), "Qwen3-VL-30B-A3B (48)": (MIXTURE, 60_000_000, 48)}
"""Stages of a block, its parameters that are at work on a token, and how many blocks there are."""


def table() -> None:
    print("| model | stage | sent, GB | GPUs | samples, s | network, s | sums, s | fitting, s | bound by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model, (stages, block, blocks) in MODELS.items():
        for workers in (1, 8, 64):
            total = 0.0
            for stage in stages:
                found = stage.bounds(block, workers)
                readers = min(len(stage.outputs), workers)
                sent = shares() * stage.groups * readers * stage.group_bytes * (1 - 1 / workers) / 1e9
                figures = " | ".join(f"{seconds:.1f}" for seconds in found.values())
                total += sum(found.values())
                bound = max(found, key=found.__getitem__)
                print(f"| {model} | {stage.name} | {sent:.1f} | {workers} | {figures} | {bound} |")
            print(f"| {model} | all blocks, hours | | {workers} | | | | {blocks * total / 3600:.1f} | |")


@dataclasses.dataclass(frozen=True)
class Run:
    """One command: its seconds, CPU seconds of itself and of each worker, and the digest of what it wrote."""

    seconds: float
    command: float
    workers: list[float]
    digest: str

    @property
    def alone(self) -> float:
        """CPU seconds of the command and its slowest worker: what it takes where every process has a core, unless they
        wait for each other."""
        return self.command + max(self.workers)

    def __str__(self) -> str:
        workers = " and ".join(f"{seconds:.0f}" for seconds in self.workers)
        return f"{self.seconds:.0f} s; CPU {self.command:.0f} s, workers {workers} s"


def once(model: str, options: list[str], workers: int, folder: Path) -> Run:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(workers):
        cluster.add_node(num_cpus=1)
    out = folder / f"workers{workers}"
    line = [sys.executable, "-m", "llava_fa.cli.main", "compress", model, str(out), *options, "--ray", cluster.address]
    begun, spent = time.monotonic(), {}
    running = psutil.Popen(line, stdout=subprocess.DEVNULL)
    while running.poll() is None:
        for process in (running, *psutil.process_iter()):
            with contextlib.suppress(psutil.Error):
                if process is running or " ".join(process.cmdline()).startswith("ray::Member"):
                    used = process.cpu_times()
                    spent[process.pid] = used.user + used.system
        time.sleep(1)
    seconds = time.monotonic() - begun
    if running.returncode:
        raise SystemExit("it failed")
    command = spent.pop(running.pid)
    cluster.shutdown()
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    shutil.rmtree(out)
    return Run(seconds, command, sorted(spent.values()), digest.hexdigest())


def measure(model: str, options: list[str]) -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit("set OMP_NUM_THREADS=1: a worker for each core")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        one, two = (once(model, options, workers, Path(folder)) for workers in (1, 2))
    if one.digest != two.digest:
        raise SystemExit("the results differ")
    print(f"one worker: {one}\ntwo: {two}\nthe same bytes, {one.seconds / two.seconds:.2f} times as fast", end="")
    print(f"; by CPU time {one.alone / two.alone:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "table"))
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("options", nargs="*", help="of compress, after --")
    args = parser.parse_args()
    if args.what == "table":
        table()
    else:
        measure(args.model, args.options)


if __name__ == "__main__":
    main()
