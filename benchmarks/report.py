"""Tables, verdicts and the picture from the rows of quality.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def line(row: dict[str, Any]) -> str:
    """One row in one line, for the log."""
    if "skipped" in row:
        return f"{row['name']:24s} skipped: {row['skipped']}"
    return (
        f"{row['name']:24s} {row['bits_per_weight']:.3f} bits  out {row['output_error']:.4f}  KL {row['kl']:.5f}  "
        f"accuracy {100 * row['accuracy']:.2f}  made in {row['make_seconds']:.0f} s"
    )


def write(out: Path, plot: Path | None) -> None:
    raise NotImplementedError
