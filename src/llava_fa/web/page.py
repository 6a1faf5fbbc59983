"""The page itself, in gradio: a picture, a question, two answers side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llava_fa.errors import FourierError
from llava_fa.web import view
from llava_fa.web.desk import Desk, Question, Ticket
from llava_fa.web.pictures import read_picture, write_examples
from llava_fa.web.side import Answer, Side, chosen_counts

POLL_SECONDS = 0.1
MIN_WIDTH = 300
SPARE_SLOTS = 16
"""Events that gradio runs at a time besides questions: clicks are not to wait behind those who wait for an answer."""
DELETE_SECONDS = (600, 3600)
"""How often visitors' pictures are looked through, and from which age on they are deleted."""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
"""Events serve this page alone, which says itself what is under way; the desk keeps the line."""


def build_page(desk: Desk, folder: Path) -> gr.Blocks:
    """The page.

    Args:
        desk: who answers.
        folder: where the examples' pictures are written.
    """
    sides = desk.sides
    with gr.Blocks(analytics_enabled=False, title="LLaVA-FA: compare", delete_cache=DELETE_SECONDS) as page:
        gr.HTML(view.introduction())
        with gr.Row():
            with gr.Column(min_width=MIN_WIDTH):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,  # as it came: it is decoded once its size is known
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=280,
                    elem_id="picture",
                )
            with gr.Column(min_width=MIN_WIDTH):
                question = gr.Textbox(
                    label="Question", lines=3, max_lines=8, placeholder="What is in the picture?", elem_id="question"
                )
                right = gr.HTML(elem_id="right")
                with gr.Row():
                    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
                longest, together = _settings(desk.limits.tokens)
        _examples(folder, picture, question, right)
        standing = gr.HTML(view.note("Upload a picture, or pick an example, and ask."), elem_id="standing")
        with gr.Row():
            columns = [_column(sides, index) for index in range(2)]
        memory = gr.HTML(view.memory(sides), elem_id="memory")

        shown = [standing, memory, ask, stop, *(part for parts, _ in columns for part in parts)]
        sliders = [slider for _, slider in columns if slider is not None]

        async def answer(
            path: str | None, text: str | None, tokens: int, both: bool, request: gr.Request, *places: int
        ) -> AsyncIterator[list[Any]]:
            news = _News()
            try:
                seen = await asyncio.to_thread(read_picture, path, desk.limits)
                given = Question(seen, text or "", tokens, chosen_counts(sides, places), both)
                ticket = desk.ask(str(request.session_hash), given)
            except FourierError as error:
                yield [view.problem(str(error)), *[gr.skip()] * (len(shown) - 1)]
                return
            try:
                done = False
                while not done:
                    done = ticket.done  # before looking: nothing changes afterwards
                    yield news.of(_state(desk, ticket, done))
                    await asyncio.sleep(0 if done else POLL_SECONDS)
            finally:  # also where the visitor leaves
                ticket.cancel()

        def give_up(request: gr.Request) -> None:
            desk.stop(str(request.session_hash))

        given = [picture, question, longest, together, *sliders]
        gr.on([ask.click, question.submit], answer, given, shown, **PRIVATE)
        stop.click(give_up, **PRIVATE)
    page.max_threads = desk.limits.requests + SPARE_SLOTS
    return page.queue()


def _settings(most: int) -> tuple[Any, Any]:
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        label = "Longest answer, in tokens"
        longest = gr.Slider(1, max(2, most), value=most, step=1, precision=0, label=label, elem_id="longest")
        together = gr.Checkbox(
            label="Both at once",
            info="To watch both write. They then share the machine, and their times are not their own.",
            elem_id="together",
        )
    return longest, together


def _column(sides: Sequence[Side], index: int) -> tuple[list[Any], Any]:
    """What changes with an answer, and the slider, if there is one."""
    side, slider = sides[index], None
    with gr.Column(min_width=MIN_WIDTH, elem_id=f"side{index}", elem_classes="card"):
        gr.HTML(view.heading(side, index))
        if len(side.counts) > 1:
            slider = _slider(side, index)
        answer = gr.HTML(view.answer_text(Answer()), elem_id=f"answer{index}")
        figures = gr.HTML(view.figures(sides, index, Answer()), elem_id=f"figures{index}")
    return [answer, figures], slider


def _slider(side: Side, index: int) -> Any:
    """Over the numbers of visual tokens, which lie too far apart for a slider of their own."""
    saved = side.counts.index(side.saved)
    slider = gr.Slider(
        0,
        len(side.counts) - 1,
        value=saved,
        step=1,
        precision=0,
        label=view.tokens_label(side, saved),
        elem_id=f"tokens{index}",
        elem_classes="tokens",
    )
    gr.HTML(view.scale(side))

    def relabel(place: int) -> Any:
        return gr.update(label=view.tokens_label(side, place))

    slider.change(relabel, slider, slider, **PRIVATE)
    return slider


def _examples(folder: Path, picture: Any, question: Any, right: Any) -> None:
    examples = write_examples(folder)
    picked = gr.Dataset(
        label="Examples from the generated world: click one",
        components=[picture],
        samples=[[path] for path, _, _ in examples],
        layout="gallery",
        samples_per_page=len(examples),
        type="index",
        elem_id="examples",
    )

    def pick(index: int) -> tuple[str, str, str]:
        path, text, answer = examples[index]
        return path, text, view.right_answer(answer)

    picked.click(pick, picked, [picture, question, right], **PRIVATE)
    # Another picture or another question, and the example's answer is not the right one any more.
    changed = [picture.upload, picture.clear, question.input]
    gr.on(changed, lambda: "", None, right, **PRIVATE)


def _state(desk: Desk, ticket: Ticket, done: bool) -> list[Any]:
    """Everything that an answer changes on the page."""
    answers = [
        part
        for index, one in enumerate(ticket.answers)
        for part in (view.answer_text(one), view.figures(desk.sides, index, one))
    ]
    buttons = [gr.update(interactive=done), gr.update(interactive=not done)]
    return [view.standing(ticket, desk.ahead(ticket)), view.memory(desk.sides), *buttons, *answers]


class _News:
    """What has changed since it was last told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def of(self, state: list[Any]) -> list[Any]:
        before, self.told = self.told or [None] * len(state), state
        return [gr.skip() if new == old else new for new, old in zip(state, before, strict=True)]
