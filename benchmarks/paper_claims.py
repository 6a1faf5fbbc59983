"""The tables of `benchmarks/ablations.py`, and the paper's claims, each with a verdict computed from the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
Figures = Mapping[str, Mapping[str, float]]

PAPER = {
    "2+2": (56.3, 14.5),
    "3+3": (59.1, 12.8),
    "4+4": (60.9, 11.2),
    "5+4": (61.0, 10.1),
    "4+5": (60.9, 10.8),
    "6+6": (61.2, 8.9),
}
"""b_r + b_θ → average score and compression ratio that the paper gives (LLaVA-FA-2B, rank 256)."""

OPEN = (
    ("23 % of the parameters are trainable; 1, 2.5, 5 M samples give 59.2, 59.7, 60.9", "recovery training: issue 4"),
    ("fewer hallucinations (Object-HalBench, POPE, MMHal) than its competitors", "needs recovery training: issue 4"),
    ("13 to 28 % faster than its competitors", "speed is not this script's subject"),
)


def report(rows: Rows, figures: Figures) -> str:
    """Everything measured so far, as Markdown."""
    groups = dict.fromkeys(str(row["group"]) for row in rows.values())
    parts = [_table(group, [row for row in rows.values() if row["group"] == group]) for group in groups]
    if figures:
        parts.append(_spectra(figures))
    lines = ["| claim of the paper | holds here? | figure |", "|---|---|---|"]
    for claim, judge in CLAIMS:
        try:
            verdict, figure = judge(rows, figures)
        except KeyError as missing:
            verdict, figure = "not measured", f"lacks {missing}"
        lines.append(f"| {claim} | {verdict} | {figure} |")
    lines += [f"| {claim} | not tested here | {why} |" for claim, why in OPEN]
    return "\n\n".join([*parts, "\n".join(lines)])


def _table(group: str, rows: list[Mapping[str, Any]]) -> str:
    paper = ["paper: ratio, score"] if group == "grid" else []
    titles = [group, "bits", "ratio", *paper, "weight", "out", "KL", "accuracy", "passes"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["name"], f"{row['bits']:.2f}", f"{16 / row['bits']:.2f}"]
        if paper:
            score, ratio = PAPER[row["name"].split(",")[0]]
            cells.append(f"{ratio}, {score}")
        cells += [f"{row['weight']:.4f}", f"{row['out']:.4f}", f"{row['kl']:.4f}"]
        cells.append(f"{100 * row['accuracy']:.1f}" if "accuracy" in row else "-")
        cells.append(f"{row['passes']:.1f}" if "passes" in row else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spectra(figures: Figures) -> str:
    lines = ["| averages over the layers | layers | Gaussian |", "|---|---|---|"]
    for key, value in figures["layers"].items():
        lines.append(f"| {key} | {value:.3g} | {figures['Gaussian'][key]:.3g} |")
    return "\n".join(lines)


def _lower(rows: Rows, name: str, *others: str) -> bool:
    """Whether the KL is lower by more than a tenth; less is not told apart."""
    return bool(rows[name]["kl"] < 0.9 * min(rows[other]["kl"] for other in others))


def _more_right(rows: Rows, name: str, other: str) -> bool:
    """Whether accuracy is higher by more than 2.5 points, about twice the error of a difference."""
    return bool(rows[name]["accuracy"] > rows[other]["accuracy"] + 0.025)


def _verdict(found: list[bool]) -> str:
    return "yes" if all(found) else "in part" if any(found) else "no"


def _told(rows: Rows, name: str, *, bits: bool = True) -> str:
    row = rows[name]
    stored = f" at {row['bits']:.2f} bits" if bits else ""
    return f"{row['kl']:.4f}{stored}" + (f" ({100 * row['accuracy']:.1f} %)" if "accuracy" in row else "")


def _decorrelation(_: Rows, figures: Figures) -> tuple[str, str]:
    found, noise = figures["layers"], figures["Gaussian"]
    same, equal, plain = (found[f"error at 0.25, {where}"] for where in ("half, same rank", "half, equal numbers", "W"))
    return (
        "no" if equal >= plain else "yes",
        f"full spectrum: singular values equal within {found['singular values differ, full']:.0e} of the largest; "
        f"half spectrum, truncated at a quarter of the rank: error {same:.3f} against {plain:.3f} at the same rank "
        f"(noise: {noise['error at 0.25, half, same rank']:.3f} against {noise['error at 0.25, W']:.3f}: the rank-one "
        f"terms are larger, nothing else), {equal:.3f} with as many stored numbers",
    )


def _symmetry(_: Rows, figures: Figures) -> tuple[str, str]:
    found = figures["layers"]
    return (
        "true, saves nothing",
        f"asymmetry {found['asymmetry']:.0e} of the largest coefficient; half the coefficients are "
        f"{found['reals of the half spectrum per weight']:.3f} stored reals a weight, a coefficient being two",
    )


def _energy(_: Rows, figures: Figures) -> tuple[str, str]:
    found, noise = figures["layers"], figures["Gaussian"]
    return (
        "no" if found["top tenth, half"] <= found["top tenth, W"] else "yes",
        f"the largest tenth of the numbers holds {100 * found['top tenth, W']:.1f} % of the energy of W, "
        f"{100 * found['top tenth, half']:.1f} % of the half spectrum's, {100 * noise['top tenth, half']:.1f} % of "
        f"noise's: the transform spreads (kurtosis {found['kurtosis, W']:.2f} → {found['kurtosis, half']:.2f}; "
        f"peak / RMS {found['peak, W']:.1f} → {found['peak, half']:.1f}), which is what suits one grid for all",
    )


def _ratios(rows: Rows, _: Figures) -> tuple[str, str]:
    cells = []
    for name, (_score, ratio) in PAPER.items():
        ours, alone = (16 / rows[f"{name}, {end}"]["bits"] for end in ("rank 256", "no rank"))
        cells.append(f"{name}: {ratio} claimed, {ours:.2f} true, {alone:.2f} without the rank")
    return "no", "; ".join(cells)


def _enough(rows: Rows, _: Figures) -> tuple[str, str]:
    two, four, six = (rows[f"{bits}, rank 256"] for bits in ("2+2", "4+4", "6+6"))
    kept = [100 * row["accuracy"] / rows["original"]["accuracy"] for row in (two, four, six)]
    return (
        "yes" if kept[1] >= 99 * kept[2] / 100 else "no",
        f"kept: {kept[1]:.1f} % of the accuracy at 4+4, {kept[2]:.1f} % at 6+6, {kept[0]:.1f} % at 2+2 (the paper's "
        f"2+2 keeps 92 % of its 6+6); true bits {four['bits']:.2f}, {six['bits']:.2f}, {two['bits']:.2f}",
    )


def _amplitude(rows: Rows, _: Figures) -> tuple[str, str]:
    cells, verdicts = [], []
    for more, end in (
        ((5, 4), "rank 256"),
        ((5, 4), "no rank"),
        ((4, 3), "no rank"),
        ((5, 3), "no rank"),
        ((4, 2), "no rank"),
    ):
        names = [f"{a}+{b}, {end}" for a, b in (more, more[::-1])]
        verdicts.append(_lower(rows, *names))
        cells.append(
            ", ".join(f"{name.split(',')[0]} {rows[name]['kl']:.4f} (out {rows[name]['out']:.4f})" for name in names)
        )
    return _verdict(verdicts), "KL with rank 256: " + cells[0] + "; without: " + "; ".join(cells[1:])


def _rank(rows: Rows, _: Figures) -> tuple[str, str]:
    names = ["4+4, no rank", "4+4, rank 64", "4+4, rank 128", "4+4, rank 256"]
    found = [rows[name]["kl"] for name in names]
    figure = "KL without, with rank 64, 128, 256: " + "; ".join(_told(rows, name) for name in names)
    return _verdict([found == sorted(found, reverse=True)]), figure


def _worth(rows: Rows, _: Figures) -> tuple[str, str]:
    pairs = [
        ("2+2, rank 128", "3+4, no rank"),
        ("2+2, rank 256", "4+5, no rank"),
        ("4+4, rank 64", "4+5, no rank"),
        ("4+4, rank 256", "6+6, no rank"),
    ]
    cells = [f"{low} {_told(rows, low)} against {code} {_told(rows, code)}" for low, code in pairs]
    return _verdict([_lower(rows, low, code) for low, code in pairs]), "KL: " + "; ".join(cells)


def _odc(end: str) -> Callable[[Rows, Figures], tuple[str, str]]:
    def judge(rows: Rows, _: Figures) -> tuple[str, str]:
        cells, nearer, better, worse = [], [], [], []
        for bits in ("2+2", "4+4"):
            without, with_ = f"{bits}, no ODC, rank 256", f"{bits}, {end}rank 256"
            nearer.append(_lower(rows, with_, without))
            better.append(_more_right(rows, with_, without))
            worse.append(_more_right(rows, without, with_))
            cells.append(
                f"{bits}: KL {_told(rows, without, bits=False)} → {_told(rows, with_, bits=False)}, "
                f"out {rows[without]['out']:.4f} → {rows[with_]['out']:.4f}"
            )
        answers = "better" if any(better) else "worse" if any(worse) else "no different"
        return f"by KL {_verdict(nearer)}; answers {answers}", "; ".join(cells)

    return judge


def _half(rows: Rows, _: Figures) -> tuple[str, str]:
    cells, verdicts = [], []
    for bits in ("2+2", "4+4"):
        names = [f"{bits}, half, equal numbers", f"{bits}, full, rank 256", f"{bits}, input axis, equal numbers"]
        verdicts.append(_lower(rows, *names))
        cells.append(f"{bits}: " + ", ".join(f"{n.split(', ')[1]} {_told(rows, n)}" for n in names))
    return "yes" if all(verdicts) else "in part" if any(
        verdicts
    ) else "no", "KL at equal numbers, no ODC: " + "; ".join(cells)


def _spatial(rows: Rows, _: Figures) -> tuple[str, str]:
    cells, over, over_groups = [], [], []
    for bits in ("2+2", "4+4"):
        names = [f"{bits}, half, equal numbers", f"{bits}, spatial, rank 256", f"{bits}, spatial g128, rank 256"]
        over.append(_lower(rows, names[0], names[1]))
        over_groups.append(_lower(rows, names[0], names[2]))
        cells.append(f"{bits}: " + ", ".join(f"{n.split(', ')[1]} {_told(rows, n)}" for n in names))
    verdict = f"over one grid a matrix {_verdict(over)}, over ranges of 128 inputs {_verdict(over_groups)}"
    return verdict, "KL at equal stored numbers: " + "; ".join(cells)


def _alternation(rows: Rows, _: Figures) -> tuple[str, str]:
    cells, verdicts = [], []
    for bits in ("2+2", "4+4"):
        row = rows[f"{bits}, rank 256"]
        once = rows[f"{bits}, 1 passes"]
        verdicts.append(_lower(rows, row["name"], once["name"]))
        cells.append(
            f"{bits}: objective {row['gain']:.3f} of the first pass's after {row['passes']:.1f} passes (at most 9), "
            f"KL {once['kl']:.4f} → {row['kl']:.4f}"
        )
    return _verdict(verdicts), "; ".join(cells)


def _stop(rows: Rows, _: Figures) -> tuple[str, str]:
    cells, verdicts = [], []
    for bits in ("2+2", "4+4"):
        row, on = rows[f"{bits}, 30 passes"], rows[f"{bits}, 30 passes, no stop"]
        verdicts.append(on["gain"] > 0.98 * row["gain"])
        cells.append(
            f"{bits}: objective {row['gain']:.3f} with the rule ({row['passes']:.1f} of 30 passes), {on['gain']:.3f} "
            f"without, KL {row['kl']:.4f} and {on['kl']:.4f}"
        )
    return _verdict(verdicts), "; ".join(cells)


CLAIMS: tuple[tuple[str, Callable[[Rows, Figures], tuple[str, str]]], ...] = (
    ("de-correlation: the spectrum's singular values are more compact", _decorrelation),
    ("conjugate symmetry halves the coefficients", _symmetry),
    ("energy compaction", _energy),
    ("compression ratios 14.5 to 8.9", _ratios),
    ("4+4 bits are as good as more", _enough),
    ("a bit of amplitude is worth more than a bit of phase (5+4 above 4+5)", _amplitude),
    ("more rank is better (64, 128, 256)", _rank),
    ("(not in the paper) rank is worth its bits: better than more code bits", _worth),
    ("ODC, in the factors as the paper places it, helps", _odc("")),
    ("(not in the paper) ODC in the codes too helps", _odc("ODC on factors and codes, ")),
    ("(not in the paper) ODC before the DFT helps", _odc("ODC before the DFT, ")),
    ("the half spectrum is the place for it", _half),
    ("low rank + codes are better in the frequency domain than in the spatial one", _spatial),
    ("Algorithm 1's alternation lowers the error", _alternation),
    ("Algorithm 1's stop rule stops at the end of the gain", _stop),
)
