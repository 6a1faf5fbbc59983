"""Ask a model a benchmark's questions, and keep what comes of it: a run, a folder that resumes and can be compared.

======================  ==========================================================================================
``run.json``            what was asked of which model, with which settings; a folder never mixes two of these
``predictions.jsonl``   one line a question, appended as answers come: where a killed run goes on
``answers.json``        every question with picture, expected answer, answer, how it was read and its score
``results.json``        the figures, their interval, versions; with ``against`` the comparison
``submission/``         what the official scorer or server takes
``changes.json``        with ``against``: the questions whose score changed, and both answers
======================  ==========================================================================================
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from llava_fa.data.textfiles import read_json, read_log
from llava_fa.errors import FourierError, shown
from llava_fa.eval.answerers import Answerer, Question, Several
from llava_fa.eval.benchmarks.base import Benchmark, Item, Reporter, Score, open_picture, write_json
from llava_fa.eval.benchmarks.statistics import interval, paired
from llava_fa.hub.blocks import evenly

BATCHES = 4
"""Batches between two writes: enough to sort questions by length, little to lose."""

Loader = Callable[[], Answerer | Several]


def run(
    benchmark: Benchmark,
    load: Loader,
    *,
    model: str,
    out: Path | None = None,
    limit: int | None = None,
    blank: bool = False,
    visual_tokens: int | str | None = None,
    through: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    against: Path | None = None,
    progress: Reporter = lambda done, total: None,
) -> dict[str, Any]:
    """Answer a benchmark's questions, score them, and write the run's folder.

    Args:
        benchmark: which one.
        load: gives who answers; called only where a question is left to ask, so that scoring and comparing a finished
            run costs seconds.
        model: its name, for the records.
        out: the run's folder; None keeps nothing. A folder with answers of the same run goes on where it stopped.
        limit: about how many questions, evenly spaced over the benchmark; pairs and rotations stay whole.
        blank: show a grey picture instead of each: what is known without looking.
        visual_tokens: for the records; `load` is to give a model that is set to it. ``"auto"`` of `answerers.Elastic`.
        through: for the records: what answers in the place of a model loaded here; a run goes on with the same.
        batch_size: questions at a time.
        against: the folder of another run of the benchmark: adds a paired test and ``changes.json``.
        progress: called with (answered, all).

    Returns:
        What ``results.json`` holds, and ``out``.

    Raises:
        FourierError: a file of the benchmark is missing or broken; the folder holds another run; ``against`` is no run
            of these questions.
    """
    began = time.monotonic()
    items = _spread(benchmark.read(), limit)
    _check_items(items, benchmark)
    other = _predictions_of(against, benchmark, items) if against is not None else None
    settings = {
        "task": benchmark.name,
        "model": model,
        "data": str(benchmark.folder) if benchmark.from_files else None,
        "limit": limit,
        "blank": blank,
        "visual_tokens": visual_tokens,
        "max_new_tokens": benchmark.max_new_tokens,
        **benchmark.asked_with(),
        **(through or {}),
    }
    rows = _resume(out, settings, items) if out is not None else {}
    before = len(rows)
    progress(before, len(items))
    left = [item for item in items if item.id not in rows]
    if left:
        rows |= _ask(benchmark, load, left, out, blank, batch_size, lambda n: progress(before + n, len(items)))
    answers = [rows[item.id]["answer"] for item in items]
    benchmark.progress = progress
    scored = benchmark.score(items, answers)
    result = {
        **settings,
        **figures_of(benchmark, scored),
        "questions": len(items),
        "resumed": before,
        "seconds": time.monotonic() - began,
        **({"visual_tokens_cost": _cost(list(rows.values()))} if visual_tokens == "auto" else {}),
        "versions": {name: version(name) for name in ("llava-fa", "torch", "transformers")},
    }
    if other is not None:
        result["against"], changes = compare(benchmark, items, other, answers)
        result["against"]["run"] = str(against)
    if out is not None:
        folder = out / "submission"
        folder.mkdir(exist_ok=True)
        result["submission"] = [str(path) for path in benchmark.submission(items, answers, folder)]
        write_json(out / "answers.json", answer_rows(items, answers, scored))
        if other is not None:
            write_json(out / "changes.json", changes)
        write_json(out / "results.json", result)
    elif other is not None:
        result["against"]["changes"] = changes
    return {**result, "out": str(out) if out is not None else None}


def figures_of(benchmark: Benchmark, scored: Score) -> dict[str, Any]:
    """``score``, its ``interval`` and how that was drawn, ``figures``, ``tasks`` (the parts); None where unknown."""
    score, ends, how = None, None, None
    if scored.units:
        score = float(benchmark.headline(scored.statistics.sum(0)))
        ends, how = scored.interval or interval(scored.statistics, benchmark.headline, share=_is_share(benchmark))
    return {
        "score": score,
        "metric": benchmark.metric,
        "percent": benchmark.percent,
        "interval": ends,
        "interval_method": how,
        "figures": scored.figures,
        "tasks": scored.parts,
    }


def compare(
    benchmark: Benchmark, items: Sequence[Item], first: Sequence[str], second: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(Paired test and counts, the questions whose score changed: those lost first.) First is the other run."""
    one, two = benchmark.score(items, first), benchmark.score(items, second)
    changes = []
    for item, a, b in zip(items, first, second, strict=True):
        was, now = one.correct[item.id], two.correct[item.id]
        if was is not None and now is not None and was != now:
            changes.append(
                {
                    **_question(item),
                    "change": "lost" if now < was else "gained",
                    "before": {"answer": a, "score": was},
                    "now": {"answer": b, "score": now},
                }
            )
    changes.sort(key=lambda row: row["now"]["score"] - row["before"]["score"])
    summary: dict[str, Any] = {
        "lost": sum(row["change"] == "lost" for row in changes),
        "gained": sum(row["change"] == "gained" for row in changes),
        "answers_that_differ": sum(a.strip() != b.strip() for a, b in zip(first, second, strict=True)),
    }
    if one.units:
        headline, share = benchmark.headline, _is_share(benchmark)
        summary["score"] = float(headline(one.statistics.sum(0)))
        summary |= paired(one.statistics, two.statistics, headline, share=share)
    return summary, changes


def answer_rows(items: Sequence[Item], answers: Sequence[str], scored: Score) -> list[dict[str, Any]]:
    """What ``answers.json`` holds."""
    return [
        {
            **_question(item),
            "answer": text,
            **({"read": scored.read[item.id]} if item.id in scored.read else {}),
            "score": scored.correct[item.id],
        }
        for item, text in zip(items, answers, strict=True)
    ]


def _question(item: Item) -> dict[str, Any]:
    paths = [str(picture) for picture in item.pictures if isinstance(picture, Path)]
    return {"id": item.id, "task": item.part, "question": item.prompt, "pictures": paths, "expected": item.expected}


def _is_share(benchmark: Benchmark) -> bool:
    return type(benchmark).headline is Benchmark.headline


def _spread(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None or limit >= len(items):
        return items
    units = list(dict.fromkeys(item.unit or item.id for item in items))
    some = {units[i] for i in evenly(len(units), max(1, round(limit * len(units) / len(items))))}
    return [item for item in items if (item.unit or item.id) in some]


def _check_items(items: Sequence[Item], benchmark: Benchmark) -> None:
    if not items:
        raise benchmark.missing(benchmark.folder, "there is no question in it")
    if twice := [name for name, times in Counter(item.id for item in items).items() if times > 1]:
        raise FourierError(f"question {twice[0]} is there twice", remedy="Mend it", where=str(benchmark.folder))
    shown = dict.fromkeys(p for item in items for p in item.pictures if isinstance(p, Path))
    lost = [path for path in shown if not path.is_file()]
    if lost:
        raise benchmark.missing(benchmark.folder, f"{len(lost)} pictures are missing, the first is {lost[0]}")


def _ask(
    benchmark: Benchmark,
    load: Loader,
    items: Sequence[Item],
    out: Path | None,
    blank: bool,
    batch_size: int,
    progress: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    size, length = {"batch_size": batch_size, "max_new_tokens": benchmark.max_new_tokens}, BATCHES * batch_size
    chunks = [items[start : start + length] for start in range(0, len(items), length)]
    rows: dict[str, dict[str, Any]] = {}
    for some, answered in zip(chunks, _answers(load(), chunks, blank, size, progress), strict=True):
        new = [{"id": item.id, "question": item.prompt, **row} for item, row in zip(some, answered, strict=True)]
        if out is not None:
            with (out / "predictions.jsonl").open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
                stream.flush()
                os.fsync(stream.fileno())
        rows |= {row["id"]: row for row in new}
        progress(len(rows))
    return rows


def _answers(
    answerer: Answerer | Several,
    chunks: Sequence[Sequence[Item]],
    blank: bool,
    size: dict[str, int],
    progress: Callable[[int], None],
) -> Iterator[list[dict[str, Any]]]:
    """Rows of one chunk of questions after the other, whose pictures are opened when they are needed."""
    if isinstance(answerer, Several):
        yield from answerer.answer_all((_questions(some, blank) for some in chunks), **size)
        return
    done = 0
    for some in chunks:
        tell = functools.partial(lambda done, n, _: progress(done + n), done)
        yield answerer.answer(_questions(some, blank), progress=tell, **size)
        done += len(some)


def _questions(items: Sequence[Item], blank: bool) -> list[Question]:
    """What is shown and asked."""
    opened = [[open_picture(picture, f"question {item.id}") for picture in item.pictures] for item in items]
    if blank:
        opened = [[Image.new("RGB", picture.size, (128, 128, 128)) for picture in seen] for seen in opened]
    return [(seen, item.prompt) for seen, item in zip(opened, items, strict=True)]


def _cost(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = [row["enough"] for row in rows]
    return {
        "mean_tokens": sum(counts) / len(counts),
        **{name: sum(row[name] for row in rows) / len(rows) for name in ("tokens_spent", "flops_share")},
        "enough": {str(count): counts.count(count) for count in sorted(set(counts))},
    }


def _resume(out: Path, settings: dict[str, Any], items: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """Answers that the folder already holds, after checks that they are this run's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "run.json").exists():
            if any(out.iterdir()):
                raise FourierError("it is not empty, and no run", remedy="Give another --out", where=str(out))
            write_json(out / "run.json", settings)
            return {}
    except OSError as error:
        raise FourierError(str(error.strerror), remedy="Give a writable --out", where=str(out)) from None
    earlier = _read_run(out)
    if earlier != json.loads(json.dumps(settings)):
        names = [name for name in sorted({*earlier, *settings}) if earlier.get(name) != settings.get(name)]
        changes = ", ".join(f"{name} was {shown(earlier.get(name))}, is {shown(settings.get(name))}" for name in names)
        raise FourierError(f"it holds another run: {changes}", remedy="Give another --out", where=str(out))
    path = out / "predictions.jsonl"
    rows = _rows(path, read_log(path))
    prompts = {item.id: item.prompt for item in items}
    for name, row in rows.items():
        if row["question"] != prompts.get(name):
            raise FourierError(
                f"question {name} is not what it was", remedy="The data changed: give another --out", where=str(path)
            )
    return rows


def _predictions_of(folder: Path, benchmark: Benchmark, items: Sequence[Item]) -> list[str]:
    """Another run's answers to these questions."""
    task = _read_run(folder).get("task")
    if task != benchmark.name:
        raise FourierError(f"it is a run of {task}", remedy=f"Give a run of {benchmark.name}", where=str(folder))
    path = folder / "predictions.jsonl"
    rows = _rows(path, read_log(path, shorten=False))
    absent = [item.id for item in items if rows.get(item.id, {}).get("question") != item.prompt]
    if absent:
        raise FourierError(
            f"{len(absent)} of these {len(items)} questions are not in it, the first is {absent[0]}",
            remedy="Let it finish, or give the same --data, --limit and --seed",
            where=str(folder),
        )
    return [rows[item.id]["answer"] for item in items]


def _read_run(folder: Path) -> dict[str, Any]:
    remedy = "Give the --out folder of `llava-fa eval`"
    path = folder / "run.json"
    settings = read_json(path, remedy) if path.exists() else None
    if not isinstance(settings, dict):
        raise FourierError("it is no run", remedy=remedy, where=str(folder))
    return settings


def _rows(path: Path, values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    rows = {}
    for number, row in enumerate(values, 1):
        try:
            rows[row["id"]] = {**row, "question": row["question"], "answer": row["answer"]}
        except (KeyError, TypeError):
            what = f"prediction {number} is {shown(row)}"
            raise FourierError(what, remedy="Remove the line", where=str(path)) from None
    return rows
