"""The benchmarks that the papers use, each read from its official files and scored by its official rules."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_fa.errors import FourierError

if TYPE_CHECKING:
    from llava_fa.eval.benchmarks.base import Benchmark

WHERE = {
    "world": "generated.World",
    "world-video": "generated.WorldVideo",
    "pope": "yes_no.POPE",
    "textvqa": "vqa.TextVQA",
    "vizwiz": "vqa.VizWiz",
    "gqa": "vqa.GQA",
    "scienceqa": "choice.ScienceQA",
    "mme": "yes_no.MME",
    "mmbench": "choice.MMBench",
    "mmbench-cn": "choice.MMBenchCN",
    "object-halbench": "captions.ObjectHalBench",
    "mmhal": "judged.MMHalBench",
    "video": "video.Video",
}
"""Name of a task → where its class is; looked up late, since commands list the names before anything heavy loads."""


def kind_of(name: str) -> type[Benchmark]:
    """The class of a benchmark.

    Raises:
        FourierError: there is none of that name.
    """
    if name not in WHERE:
        raise FourierError(f"there is no task {name!r}", remedy=f"Choose among {', '.join(WHERE)}")
    module, _, kind = WHERE[name].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), kind)  # type: ignore[no-any-return]


def benchmark(name: str, folder: str | Path = ".", **options: Any) -> Benchmark:
    """A benchmark on a folder of its official files (docs/benchmarks.md says which).

    Raises:
        FourierError: there is none of that name, or no such folder.
    """
    kind, place = kind_of(name), Path(folder).expanduser()
    if kind.from_files and not place.is_dir():
        raise FourierError("no such folder", remedy=f"{name} needs {kind.files}", where=str(place))
    return kind(place, **options)
