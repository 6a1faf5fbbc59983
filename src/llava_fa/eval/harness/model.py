"""The adapter: lmms-eval's requests, answered by the runner of `llava-fa eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from llava_fa.bounds import COUNT, from_environment
from llava_fa.data.pictures import open_picture
from llava_fa.errors import FourierError
from llava_fa.eval.benchmarks.video import PICTURES, frames_of
from llava_fa.eval.likelihood import log_likelihood
from llava_fa.eval.runner import answer
from llava_fa.hub.loading import load
from llava_fa.hub.processor import check_chat_template

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLING = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
_IMAGES_FILMS = (".gif", ".webp")
_LONGEST = 1024
"""Tokens where a task does not say how many: as lmms-eval's own models."""
_BATCHES = 8
"""Batches whose pictures are in memory at once."""


class LlavaFA(lmms):
    """An original or compressed model, asked with the prompts of `llava-fa eval`.

    ``lmms-eval --model llava_fa --model_args pretrained=DIR,visual_tokens=16 --tasks …``

    Args:
        pretrained: ``tiny``, a folder, or a hub id; original or compressed.
        visual_tokens: how many tokens a picture is told in; by default as the model was saved.
        max_frames_num: in how many frames a clip is shown.
        dtype: of what is computed; by default bf16 where the device is fast at it, else float32.
        device: a torch device; by default a GPU where there is one, each process its own.
        batch_size: questions at a time, lmms-eval's ``--batch_size``.
        max_batch_size: lmms-eval's, for sizes that it finds by itself; not used.

    Raises:
        FourierError: an argument that does not exist or cannot be; no such model.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "tiny",
        visual_tokens: int | None = None,
        max_frames_num: int = 8,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise FourierError(
                f"llava_fa does not know {', '.join(unknown)}",
                remedy="Give pretrained, visual_tokens, max_frames_num, dtype, device or batch_size",
                where="--model_args",
            )
        if dtype not in DTYPES:
            raise FourierError(f"dtype {dtype!r}", remedy=f"Give one of {', '.join(DTYPES)}", where="--model_args")
        numbers = {"batch_size": batch_size, "max_frames_num": max_frames_num, "visual_tokens": visual_tokens}
        for name, value in numbers.items():
            if value is not None and not (str(value).isdecimal() and 0 < len(str(value)) < 10 and int(value) > 0):
                raise FourierError(f"{name} is {value!r}", remedy="Give a number", where="lmms-eval's arguments")
        self.batch_size, self.frames = int(batch_size), int(max_frames_num)
        if device is None:
            local = from_environment("LOCAL_RANK", 0, 0, COUNT)
            device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        tokens = None if visual_tokens is None else int(visual_tokens)
        self.model, self.processor = load(str(pretrained), str(device), DTYPES[dtype], tokens)
        check_chat_template(self.processor, pretrained)
        self.device = self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, greedy unless a task asks for a temperature; cut at the first of the texts ``until``."""
        answers = [""] * len(requests)
        options = [settings(request.args[1]) for request in requests]
        with self._bar(len(requests)) as bar:
            for same in list({repr(each): each for each in options}.values()):
                places = [i for i, each in enumerate(options) if each == same]
                for some in self._windows(places, [len(request.args[0]) for request in requests]):
                    pairs = [(self._seen(*requests[i].args[2:]), requests[i].args[0]) for i in some]
                    texts = answer(self.model, self.processor, pairs, batch_size=self.batch_size, **same)
                    for i, text in zip(some, texts, strict=True):
                        answers[i] = text
                    bar.update(len(some))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(log p, whether it is what the model says) of each continuation; (-log p, …) where options are weighed.

        lmms-eval documents log p, but its ``multiple_choice`` tasks take the option with the least number, a loss in
        its own models (its issue 370). Those hand over the continuation as text, the others as a function of the
        document. The pair is the ``text`` of a result: lmms-eval 0.7.3 makes a string of whatever else is no text.
        """
        results: list[Any] = [None] * len(requests)
        with self._bar(len(requests)) as bar:
            for some in self._windows(range(len(requests)), [len(request.args[0]) for request in requests]):
                triples, signs = [], []
                for i in some:
                    if len(requests[i].args) != 6:
                        raise FourierError(
                            "it asks how likely an answer is without its question",
                            remedy="Leave the metric acc_mutual_info out: lmms-eval has it for no model",
                            where=f"task {requests[i].task_name}",
                        )
                    context, continuation, doc_to_visual, doc_id, task, split = requests[i].args
                    signs.append(-1 if isinstance(continuation, str) else 1)
                    if not isinstance(continuation, str):
                        continuation = str(continuation(self.task_dict[task][split][doc_id]))
                    triples.append((self._seen(doc_to_visual, doc_id, task, split), context, continuation))
                logs = log_likelihood(self.model, self.processor, triples, batch_size=self.batch_size)
                for i, sign, (value, greedy) in zip(some, signs, logs, strict=True):
                    results[i] = GenerationResult((sign * value, greedy))
                bar.update(len(some))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: LLaVA-1.5's benchmarks have none, and pictures would come in the middle of a conversation."""
        raise FourierError(
            "llava_fa answers single questions, and this task is a conversation",
            remedy="Leave it out of --tasks",
            where=f"task {requests[0].task_name}" if requests else "",
        )

    def _bar(self, total: int) -> Any:
        return tqdm(total=total, desc="answering", disable=self.rank != 0)

    def _windows(self, places: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Some at a time, like lengths together: the pictures of a whole benchmark need not fit into memory."""
        order = sorted(places, key=lambda i: lengths[i])
        step = _BATCHES * self.batch_size
        return (order[first : first + step] for first in range(0, len(order), step))

    def _seen(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> list[Image.Image]:
        """The pictures that go with a question: those of its document, and the frames of its clips."""
        where = f"task {task}, document {doc_id}"
        pictures: list[Image.Image] = []
        for seen in doc_to_visual(self.task_dict[task][split][doc_id]) or []:
            for one in seen if isinstance(seen, (list, tuple)) else [seen]:
                pictures += self._pictures(one, where)
        return pictures

    def _pictures(self, seen: Any, where: str) -> list[Image.Image]:
        if isinstance(seen, Image.Image):
            return [open_picture(seen, where)]
        if not isinstance(seen, (str, Path)):
            raise FourierError(
                f"it shows a {type(seen).__name__}", remedy="llava_fa takes pictures and clips only", where=where
            )
        path = Path(seen)
        if path.is_dir() or path.suffix.lower() in _IMAGES_FILMS:
            return [open_picture(frame, where) for frame in frames_of(path, self.frames, where)]
        if path.suffix.lower() in PICTURES:
            return [open_picture(path, where)]
        from lmms_eval.models.model_utils.load_video import read_video

        try:
            return [Image.fromarray(frame) for frame in read_video(str(path), num_frm=self.frames)]
        except (OSError, ValueError) as error:
            raise FourierError(f"{path} cannot be read ({error})", remedy="Check the clip", where=where) from None


def settings(task: dict[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as options of `runner.answer`.

    A temperature above 0 samples, unless ``do_sample`` says no. What LLaVA's own code is told of pictures
    (``image_aspect_ratio``) is the processor's here.

    Raises:
        FourierError: one that is not known: to ignore it might change the score.
    """
    task = dict(task)
    task.pop("image_aspect_ratio", None)
    until = task.pop("until", None) or []
    longest = task.pop("max_new_tokens", None) or task.pop("max_gen_toks", None) or _LONGEST
    temperature = task.get("temperature")
    do_sample = bool(task.pop("do_sample", temperature)) and temperature != 0
    if unknown := sorted(set(task) - set(SAMPLING)):
        raise FourierError(
            f"llava_fa does not know the setting {', '.join(unknown)}",
            remedy=f"Choose among until, max_new_tokens, do_sample, {', '.join(SAMPLING)}",
            where="generation_kwargs",
        )
    sampling = {name: value for name, value in task.items() if value is not None}
    if not do_sample:
        sampling = {name: value for name, value in sampling.items() if name not in SAMPLING[:3]}
    return {
        "until": [until] if isinstance(until, str) else list(until),
        "max_new_tokens": int(longest),
        "sampling": {"do_sample": do_sample, **sampling},
    }
