"""Tables, verdicts, goals and the picture, from the rows of quality.py alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from common import Rows

Found = dict[str, Any]

STYLES = {  # families in the order of the tables: color, line
    "best, budget": ("#1a5fb4", "o-"),
    "best, trellis": ("#26a269", "o-"),
    "best": ("#62a0ea", "o-"),
    "best, target=weights": ("#62a0ea", "x"),
    "best, trellis, data-free": ("#26a269", "o:"),
    "best, data-free": ("#62a0ea", "o:"),
    "QuIP#, E8P": ("#a51d2d", "^-"),
    "AutoRound g128": ("#9141ac", "^-"),
    "GPTQ g128": ("#e5a50a", "^-"),
    "HQQ": ("#c64600", "v:"),
    "torchao": ("#813d9c", "v:"),
    "quanto": ("#63452c", "v:"),
    "bitsandbytes": ("#000000", "D:"),
    "RTN g128": ("#77767b", "v:"),
    "paper": ("#f66151", "s:"),
}
TITLES = {"tiny": "embedded LMM", "smollm2": "SmolLM2-135M (manuals)", "minilm": "all-MiniLM-L6-v2 (retrieval)"}
GOALS = ((True, 4, 99.5), (True, 3, 99.0), (True, 2, 95.0), (True, 1.5, 80.0), (False, 4, 99.3), (False, 3, 97.0))
"""Data or none, nominal bits, % of the original's accuracy that are to be kept."""
FURTHER = {"state_error": ("final states", "{:.3f}"), "perplexity": ("perplexity", "{:.2f}")}
"""What only some models are measured by: its column, and how it is written."""
ROOM = 0.25
"""Stored bits beyond the nominal ones with which a row still counts as one of that many bits: GPTQ's 4.25 is 4 bits."""


def line(row: Found) -> str:
    """One row in one line, for the log."""
    if "skipped" in row:
        return f"{row['name']:24s} skipped: {row['skipped']}"
    return (
        f"{row['name']:24s} {row['bits_per_weight']:.3f} bits  out {row['output_error']:.4f}  KL {row['kl']:.5f}  "
        f"{told(row)}  made in {row['make_seconds']:.0f} s"
    )


def told(row: Found) -> str:
    """What beside KL is known of a row."""
    return f"perplexity {row['perplexity']:.2f}" if "perplexity" in row else f"accuracy {percent(row)}"


def write(out: Path, picture: Path | None) -> None:
    """Print everything for every model in the folder; draw the picture if asked."""
    models = {}
    for path in sorted(out.glob("*.jsonl"), reverse=True):  # tiny before smollm2 before minilm
        rows = Rows(path)
        found = [row for row in rows if "skipped" not in row]  # a later row of a name has more than an earlier one
        models[path.stem] = {row["name"]: row for row in found}
        parts = [f"## {path.stem}", overview(models[path.stem]), table(models[path.stem]), verdicts(models[path.stem])]
        if "tasks" in models[path.stem]["original"]:
            parts.append(goals(models[path.stem]))
        print("\n\n".join(parts), end="\n\n")
        for row in rows:
            if "skipped" in row and row["name"] not in models[path.stem]:
                print(line(row))
    if picture:
        plot(models, picture)


def ours(row: Found) -> bool:
    return row["family"].startswith("best")


def percent(row: Found) -> str:
    return f"{100 * row['accuracy']:.1f}" if "accuracy" in row else ""


def kept(row: Found, rows: dict[str, Found]) -> float:
    return 100 * row["accuracy"] / rows["original"]["accuracy"]


def overview(rows: dict[str, Found]) -> str:
    """Families against nominal bits: % of the accuracy kept, KL, and in brackets the true bits."""
    widths = (4, 3, 2, 1.5)
    lines = [f"| method | {' | '.join(f'{bits:g} bits' for bits in widths)} |", f"|---|{'---|' * len(widths)}"]
    for family in STYLES:
        if "target=" in family:  # an ablation
            continue
        cells = []
        for bits in widths:
            found = [row for row in rows.values() if row["family"] == family and row["bits"] == bits]
            best = min(found, key=lambda row: row["kl"], default=None)
            cells.append("" if best is None else cell(best, rows))
        if any(cells):
            lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: Found, rows: dict[str, Found]) -> str:
    share = f"{kept(row, rows):.1f} %, " if "accuracy" in row else ""
    return f"{share}{row['kl']:.4f} ({row['bits_per_weight']:.2f})"


def table(rows: dict[str, Found]) -> str:
    """Every row with everything measured."""
    original = rows["original"]
    tasks, more = list(original.get("tasks", {})), [key for key in FURTHER if key in original]
    columns = ["row", "bits/weight", "output error", "KL", *(FURTHER[key][0] for key in more)]
    if "accuracy" in original:
        columns += ["accuracy" if tasks else "agreement", "kept", *tasks]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in sorted(rows.values(), key=lambda row: (-math.ceil(2 * row["bits"]) / 2, row["kl"])):
        cells = [row["name"], f"{row['bits_per_weight']:.2f}", f"{row['output_error']:.4f}"]
        cells += [f"{row['kl']:.5f}", *(FURTHER[key][1].format(row[key]) for key in more)]
        if "accuracy" in original:
            cells += [percent(row), f"{kept(row, rows):.1f} %" if "accuracy" in row else ""]
        cells += [f"{100 * row['tasks'][task]:.1f}" if "tasks" in row else "" for task in tasks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(rows: dict[str, Found]) -> str:
    """For every peer the row of ours with at most its bits that has the least KL, and, where the peer had no data, the
    same among ours without data; won or lost by KL, and by accuracy, where two standard errors are called even.
    """
    head = ["peer", "bits", "KL", "accuracy", "ours with at most its bits", "bits", "KL", "accuracy"]
    lines = [f"| {' | '.join([*head, 'by KL', 'by accuracy'])} |", f"|{'---|' * (len(head) + 2)}"]
    tally: dict[str, Counter[str]] = {"KL": Counter(), "accuracy": Counter()}
    for peer in sorted(rows.values(), key=lambda row: (-row["bits"], row["kl"])):
        if ours(peer) or peer["family"] == "original":
            continue
        for data in (True, False):
            if not data and peer["data"]:
                continue
            rivals = [row for row in rows.values() if ours(row) and (data or not row["data"])]
            rivals = [row for row in rivals if row["bits_per_weight"] <= peer["bits_per_weight"] + 1e-3]
            left = f"| {peer['name']} | {figures(peer)}"
            if not rivals:
                lines.append(f"{left} | none{'' if data else ' without data'} | | | | | |")
                continue
            mine = min(rivals, key=lambda row: row["kl"])
            by_kl = "won" if mine["kl"] < peer["kl"] else "lost"
            tally["KL"][by_kl] += 1
            by_accuracy = ""
            if "accuracy" in mine and "accuracy" in peer:
                verdict, gap = compare(mine, peer)
                tally["accuracy"][verdict] += 1
                by_accuracy = f"{verdict} ({gap})"
            lines.append(f"{left} | {mine['name']} | {figures(mine)} | {by_kl} | {by_accuracy} |")
    counts = [f"by {what}: {', '.join(f'{n} {v}' for v, n in sorted(found.items()))}" for what, found in tally.items()]
    return "\n".join([*lines, "", "; ".join(counts)])


def figures(row: Found) -> str:
    return f"{row['bits_per_weight']:.2f} | {row['kl']:.5f} | {percent(row)}"


def compare(mine: Found, peer: Found) -> tuple[str, str]:
    """won, even or lost, and the difference in points with its standard error from the questions answered unequally."""
    unequal = sum(a != b for a, b in zip(mine["hits"], peer["hits"], strict=True))
    error = 100 * math.sqrt(unequal) / len(mine["hits"])
    difference = 100 * (mine["accuracy"] - peer["accuracy"])
    verdict = "even" if abs(difference) <= 2 * error else "won" if difference > 0 else "lost"
    return verdict, f"{difference:+.1f} ± {error:.1f}"


def goals(rows: dict[str, Found]) -> str:
    """Met or missed, by the row of ours of least KL within the nominal bits and `ROOM`, and by one within the bits."""
    lines = ["| goal | row | bits | kept | | within the very bits | kept | |", f"|{'---|' * 8}"]
    for data, bits, least in GOALS:
        cells = [f"{'calibrated' if data else 'data-free'}, {bits:g} bits: ≥ {least} %"]
        for room in (ROOM, 1e-3):
            found = [row for row in rows.values() if ours(row) and (row["data"], row["bits"]) == (data, bits)]
            found = [row for row in found if row["bits_per_weight"] <= bits + room and "accuracy" in row]
            best = min(found, key=lambda row: row["kl"], default=None)
            if best is None:
                cells += ["not measured", "", "", ""] if room == ROOM else ["none", "", ""]
                continue
            share = kept(best, rows)
            name = [best["name"], f"{best['bits_per_weight']:.2f}"]
            cells += name if room == ROOM else [f"{name[0]} ({name[1]})"]
            cells += [f"{share:.1f} %", "met" if share >= least else "missed"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(models: dict[str, dict[str, Found]], path: Path) -> None:
    """Accuracy and KL against true bits of the first model, KL of the others, one line a family."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "llava-fa"  # the same picture has the same bytes
    import matplotlib.pyplot as plt

    wanted = [("tiny", "accuracy"), ("tiny", "kl"), ("smollm2", "kl"), ("minilm", "kl")]
    panels = [(model, key) for model, key in wanted if model in models]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.4))
    for (model, key), place in zip(panels, axes, strict=True):
        for family, (color, style) in STYLES.items():
            points = sorted(
                (row["bits_per_weight"], (100 if key == "accuracy" else 1) * row[key])
                for row in models[model].values()
                if row["family"] == family and key in row
            )
            if points:
                wide = 2.0 if family.startswith("best") else 1.0
                place.plot(*zip(*points, strict=True), style, color=color, label=family, markersize=4, linewidth=wide)
        if key == "accuracy":
            place.axhline(100 * models[model]["original"]["accuracy"], color="black", linewidth=0.8, linestyle="--")
            place.set_ylim(0, 100)
            place.set_ylabel("accuracy, mean of nine tasks (%)")
        else:
            place.set_yscale("log")
            place.set_ylabel("KL to the original (nats)")
        place.set_title(TITLES[model], fontsize=10)
        place.set_xlabel("bits per weight, every stored byte counted")
        place.grid(alpha=0.25)
    drawn = {label: handle for place in axes for handle, label in zip(*place.get_legend_handles_labels(), strict=True)}
    known = [family for family in STYLES if family in drawn]
    figure.legend([drawn[family] for family in known], known, loc="lower center", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, metadata={"Date": None})
