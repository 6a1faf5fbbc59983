"""`llava-fa chat`: one question about one picture, answered as it is generated."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fa.cli import output
from llava_fa.errors import FourierError


def chat(
    model: Annotated[str, typer.Argument(help="`tiny`, a folder (compressed or not), or a hub id.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[Path, typer.Option(help="The picture to ask about.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, …")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Ask a model one question about a picture; the answer streams."""
    from llava_fa.hub.calibration_data import open_image

    picture = open_image(image.expanduser(), "--image")
    start = time.monotonic()
    answer, tokens = _answer(model, device, picture, question, max_new_tokens, stream=not json_output)
    if json_output:
        seconds = time.monotonic() - start
        output.print_json({"answer": answer, "tokens": tokens, "seconds": seconds})


def _answer(
    model: str, device: str, picture: Any, question: str, max_new_tokens: int, *, stream: bool
) -> tuple[str, int]:
    import torch
    from transformers import TextStreamer

    from llava_fa.hub.loading import load

    loaded, processor = load(model, device)
    if not getattr(processor, "chat_template", None):
        raise FourierError("its processor has no chat template", remedy="Add chat_template.jinja", where=model)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[picture], text=[text], return_tensors="pt").to(loaded.device, loaded.dtype)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with torch.inference_mode():
        ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    new = ids[0, inputs["input_ids"].shape[1] :]
    sys.stdout.flush()
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new)
