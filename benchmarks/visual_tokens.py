"""Accuracy of the embedded model against its visual tokens: plain pooling, M3, random truncation (MQT), FMVR.

python benchmarks/visual_tokens.py all --steps 4500 --plot docs/visual_tokens.svg --minutes 9   # again until it is done
python benchmarks/visual_tokens.py train fmvr               # pooling, queries: the same steps and pictures; resumes
python benchmarks/visual_tokens.py eval                     # every model at every number; one JSON line each, resumes
python benchmarks/visual_tokens.py report --plot docs/visual_tokens.svg
python benchmarks/visual_tokens.py flops                    # LLaVA-1.5-7B
python benchmarks/visual_tokens.py saliency                 # does the map find what is asked about?
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import Rows, arguments, clip_large
from learned_queries import QueryLearner, with_queries

STEPS, SEED = 4500, 11
KINDS = {"fmvr": "FMVR", "pooling": "M3: pooling, trained", "queries": "MQT-style: truncated queries"}
PLAIN = "pooling, not trained"


class OutOfTimeError(Exception):
    """The minutes are over; what is saved is resumed by the next call."""


def train(kind: str, out: Path, steps: int, until: float) -> None:
    from llava_fa.world.elastic import elastic_recipe
    from llava_fa.world.training import log_to, new_learner
    from llava_fa.world.training import train as run

    out.mkdir(parents=True, exist_ok=True)
    recipe = elastic_recipe(kind, steps, seed=SEED)
    log = log_to(out / f"{kind}.jsonl")

    def report(row: dict) -> None:
        if "validation" not in row:
            log(row)
        elif time.monotonic() > until:  # the state of this step is saved
            raise OutOfTimeError

    if not (out / kind / "model").is_dir():
        learner = QueryLearner if kind == "queries" else new_learner
        often = {"save_every": 25, "check_every": 25, "check_batches": 0}
        run(out / kind, recipe, workers=0, report=report, make_learner=learner, **often)


def evaluate(out: Path, limit: int, steps: int, until: float) -> None:
    from llava_fa.eval.runner import evaluate_world
    from llava_fa.hub.loading import load

    rows = Rows(out / "accuracy.jsonl")
    done = {(row["model"], row["tokens"], row["limit"], row["steps"]) for row in rows}
    models = {"plain": "tiny"} | {kind: out / kind / "model" for kind in KINDS if (out / kind / "model").is_dir()}
    for tokens in (64, 16, 4, 1, "auto"):
        for name, folder in models.items():
            trained = 0 if name == "plain" else steps
            if (name, tokens, limit, trained) in done or (tokens == "auto" and name == "plain"):
                continue
            if time.monotonic() > until:
                raise OutOfTimeError
            elastic = tokens == "auto"
            model, processor = load(folder, "cpu", torch.float32, visual_tokens=64 if elastic else tokens)
            result = evaluate_world(model, processor, limit=limit, elastic=elastic)
            result.pop("answers")
            facts = {"model": name, "steps": trained, "tokens": tokens, "limit": limit}
            rows.add({**facts, "date": time.strftime("%Y-%m-%d"), **result})
            print(name, tokens, round(result["accuracy"], 4), f"{result['seconds']:.0f} s", flush=True)


def report(out: Path, plot: Path | None) -> None:
    rows = Rows(out / "accuracy.jsonl")
    full = next(row["accuracy"] for row in rows if (row["model"], row["tokens"]) == ("plain", 64))
    steps = {row["model"]: row["steps"] for row in rows}
    names = {"plain": PLAIN} | {kind: f"{title}, {steps[kind]} steps" for kind, title in KINDS.items() if kind in steps}
    score = {(row["model"], row["tokens"]): row for row in rows}
    heading = f"{rows[0]['questions']} questions, accuracy (share of the original's {100 * full:.1f})"
    print(f"| {heading} | 64 | 16 | 4 | 1 | auto |")
    print("|---|---|---|---|---|---|")
    for name, title in names.items():
        cells = []
        for tokens in (64, 16, 4, 1, "auto"):
            row = score.get((name, tokens))
            if row is None:
                cells.append("")
                continue
            text = f"{100 * row['accuracy']:.1f} ({100 * row['accuracy'] / full:.1f} %)"
            if tokens == "auto":
                cost = row["visual_tokens"]
                text += f"; {cost['mean_tokens']:.1f} enough, {cost['tokens_spent']:.1f} read"
                text += f", {100 * cost['flops_share']:.0f} % of the operations"
            cells.append(text)
        if any(cells):
            print(f"| {title} | " + " | ".join(cells) + " |")
    for name in (name for name in KINDS if (name, 1) in score):
        print(f"\n| {names[name]} | 64 | 16 | 4 | 1 |\n|---|---|---|---|---|")
        for task in rows[0]["tasks"]:
            shares = [score[name, n]["tasks"][task]["score"] for n in (64, 16, 4, 1)]
            print(f"| {task} | " + " | ".join(f"{100 * value:.1f}" for value in shares) + " |")
    if plot is not None:
        draw(score, names, full, plot)


def draw(score: dict, names: dict[str, str], full: float, plot: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "llava-fa"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    styles = {"plain": "x:", "fmvr": "o-", "pooling": "s--", "queries": "^-."}
    for name, title in names.items():
        points = [(n, score[name, n]["accuracy"]) for n in (64, 16, 4, 1) if (name, n) in score]
        if points:
            axes.plot(*zip(*points, strict=True), styles[name], label=title)
    for share in (0.99, 0.95):
        axes.axhline(share * full, color="0.75", linewidth=0.8, zorder=0)
        axes.text(1, share * full, f"{100 * share:.0f} %", color="0.5", fontsize=8, va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes.set_xlabel("visual tokens a picture")
    axes.set_ylabel("accuracy, mean of nine tasks")
    axes.legend()
    figure.tight_layout()
    figure.savefig(plot, metadata={"Date": None})


def flops() -> None:
    from transformers import LlamaConfig, LlavaConfig

    from llava_fa.hub.flops import count_flops

    config = LlavaConfig(vision_config=clip_large(), text_config=LlamaConfig(vocab_size=32064))
    full = count_flops(config, text=32, visual_tokens=576)
    for tokens in (576, 144, 36, 9, 1):
        row = count_flops(config, text=32, visual_tokens=tokens)
        saved = 1 - row.language_model / full.language_model, 1 - row.total / full.total
        seen = (row.vision_tower + row.projector) / 1e12
        print(f"| {tokens} | {seen:.2f} | {row.language_model / 1e12:.2f} | {100 * saved[0]:.1f} % "
              f"| {row.total / 1e12:.2f} | {100 * saved[1]:.1f} % |")  # fmt: skip


def saliency(count: int = 60) -> None:
    """How often a map's peak is within two patches of the thing that a question is about."""
    from llava_fa.eval.explain import evidence
    from llava_fa.hub.loading import load
    from llava_fa.world.samples import samples

    model, processor = load("tiny", "cpu", torch.float32)
    hits = {"Grad-CAM (mean gradient)": 0, "each cell's own gradient": 0}
    chance = 0.0
    asked = samples("test", 0, count, ("attributes",))[:count]
    for sample in asked:
        (thing,) = sample.question.mentions[0][1]
        _, _, grid, slope = evidence(model, processor, sample.image, sample.question.text, max_new_tokens=4)
        near = [abs(12 * (i % 8) + 6 - thing.x) <= 24 and abs(12 * (i // 8) + 6 - thing.y) <= 24 for i in range(64)]
        chance += sum(near) / 64
        for name, values in zip(hits, (grid @ slope.mean(0), (grid * slope).sum(1)), strict=True):
            hits[name] += near[int(values.argmax())]
    for name, near_it in (*hits.items(), ("a random cell", chance)):
        print(f"{name}: {100 * near_it / len(asked):.0f} % of {len(asked)} questions")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("all", "train", "eval", "report", "flops", "saliency"))
    parser.add_argument("kind", nargs="?", choices=tuple(KINDS))
    parser.add_argument("--out", type=Path, default=Path("runs/visual-tokens"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--limit", type=int, default=900)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)
    with_queries()
    try:
        for kind in {"all": list(KINDS), "train": [args.kind]}.get(args.what, []):
            train(kind, args.out, args.steps, until)
        if args.what in ("all", "eval"):
            evaluate(args.out, args.limit, args.steps, until)
    except OutOfTimeError:
        print("out of time; the same command goes on")
        return
    if args.what in ("all", "report"):
        report(args.out, args.plot)
    elif args.what in ("flops", "saliency"):
        {"flops": flops, "saliency": saliency}[args.what]()


if __name__ == "__main__":
    main()
