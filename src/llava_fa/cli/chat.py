"""`llava-fa chat`: one question about one picture, answered as it is generated."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fa.cli import options, output


def chat(
    model: options.Model,
    question: Annotated[str, typer.Argument(help="What to ask.", callback=options.text)],
    image: Annotated[
        list[Path] | None, typer.Option(help="The picture to ask about; given more than once, frames in order.")
    ] = None,
    max_new_tokens: options.MaxTokens = 256,
    visual_tokens: options.VisualTokens = None,
    device: options.Device = "auto",
    json_output: options.Json = False,
) -> None:
    """Ask a model one question about a picture, about several, or about none; the answer streams."""
    count, elastic = options.elastic(visual_tokens)
    from llava_fa.data.pictures import open_picture
    from llava_fa.hub.loading import load
    from llava_fa.hub.processor import check_chat_template, check_sees

    pictures = [open_picture(path.expanduser(), "--image") for path in image or ()]
    start = time.monotonic()
    loaded, processor = load(model, device, visual_tokens=count)
    check_chat_template(processor, model)
    if pictures:
        check_sees(processor, model)
    if elastic:
        from llava_fa.eval.runner import answer_elastic

        (answer,), (enough,), cost = answer_elastic(
            loaded, processor, [(pictures, question)], max_new_tokens=max_new_tokens
        )
        result = {"answer": answer, "visual_tokens": enough, "flops_share": cost["flops_share"]}
        if not json_output:
            typer.echo(answer)
            output.stderr().print(
                f"[dim]{enough} visual tokens a picture were enough; asking took {100 * cost['flops_share']:.0f} % "
                "of the operations of asking with all[/]"
            )
    else:
        answer, tokens = _answer(loaded, processor, pictures, question, max_new_tokens, stream=not json_output)
        result = {"answer": answer, "tokens": tokens}
    if json_output:
        output.print_json({**result, "seconds": time.monotonic() - start})


def _answer(
    loaded: Any, processor: Any, pictures: list[Any], question: str, max_new_tokens: int, *, stream: bool
) -> tuple[str, int]:
    import torch
    from transformers import TextStreamer

    from llava_fa.eval.runner import inputs_of, prompt, room

    inputs = inputs_of(loaded, processor, [pictures], [prompt(processor, len(pictures), question)])
    max_new_tokens = min(max_new_tokens, room(loaded, inputs))
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with torch.inference_mode():
        ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new)
