"""Samples on disk for people and for other tools: pictures, a LLaVA-format JSON, one overview picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llava_fa.world.samples import Sample

COLUMNS, CELL, MAGNIFY = 6, (212, 312), 2
MOST, LINE = 36, 30


def write_gallery(samples: Sequence[Sample], folder: Path) -> tuple[Path, Path]:
    """Write ``images/*.png``, ``questions.json`` (LLaVA format) and ``overview.png``; returns the last two."""
    (folder / "images").mkdir(exist_ok=True)
    rows, files = [], {}
    for sample in samples:
        if id(sample.image) not in files:  # a pair or a rotation shares its picture
            files[id(sample.image)] = f"images/{len(files):05d}.png"
            sample.image.save(folder / files[id(sample.image)])
        question = sample.question
        rows.append(
            {
                "id": f"{len(rows):05d}",
                "image": files[id(sample.image)],
                "task": question.task,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question.text}"},
                    {"from": "gpt", "value": question.answer},
                ],
            }
        )
    questions, overview = folder / "questions.json", folder / "overview.png"
    questions.write_text(json.dumps(rows, indent=1))
    shown = [samples[i * len(samples) // min(MOST, len(samples))] for i in range(min(MOST, len(samples)))]
    draw_overview(shown).save(overview, optimize=True)
    return questions, overview


def draw_overview(samples: Sequence[Sample]) -> Image.Image:
    """Pictures in a grid, each with its task, question and answer beneath."""
    height = -(-len(samples) // COLUMNS) * CELL[1]
    sheet = Image.new("RGB", (COLUMNS * CELL[0], height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, sample in enumerate(samples):
        x, y = (i % COLUMNS) * CELL[0] + 10, (i // COLUMNS) * CELL[1] + 10
        picture = sample.image.resize([MAGNIFY * side for side in sample.image.size], Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        question = sample.question
        text = f"[{question.task}]\n{question.text}\n» {question.answer}"
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, LINE) or [""]]
        draw.multiline_text((x, y + picture.height + 6), "\n".join(lines), fill="black", font=font)
    return sheet
