"""Data-free compression of a checkpoint, one weight in memory at a time, and the assembly of the result.

Both ways of compressing (here, and block by block in `calibrated`) leave finished layers as parts in the work
folder; `assemble` then writes the new checkpoint from them and from everything that stays as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from llava_fa.config import FourierConfig
from llava_fa.errors import disk_errors, located
from llava_fa.hub import ledger
from llava_fa.hub.checkpoint import NAMES, ORIGINAL_BYTES, LayerRecord, Metadata, codebook_digest, names_digest
from llava_fa.hub.overlap import Overlap
from llava_fa.hub.plan import Plan, PlannedLayer
from llava_fa.hub.provenance import record_tokens
from llava_fa.hub.report import Measurement, Progress, ProgressCallback
from llava_fa.hub.shards import Entry, Item, write_file, write_text
from llava_fa.hub.source import INDEX, SINGLE, beside, read_object
from llava_fa.hub.work_folder import Parts, WorkFolder
from llava_fa.maths.device import halving, precise
from llava_fa.nn.codebooks import codebook_key
from llava_fa.solver.approximate import approximate
from llava_fa.solver.approximation import Approximation
from llava_fa.solver.drift import corrected_weight
from llava_fa.solver.portions import approximate_portions
from llava_fa.solver.scratch import given_back

CPU = torch.device("cpu")
SHARD_BYTES = 4_000_000_000
"""Largest weight file written (as far as one tensor allows)."""


class Job:
    """A compression under way: its plan, its work folder, and how far it is.

    Args:
        plan: what is compressed; a budget's is exchanged for one with bits when these are settled.
        work: where finished layers are kept; open. Of a worker elsewhere (`cluster.member`) the parts alone.
        callback: told of every step.
        device: where layers are fitted.
    """

    def __init__(
        self, plan: Plan, work: WorkFolder | Parts, callback: ProgressCallback, device: torch.device = CPU
    ) -> None:
        self.device = precise(device)
        self.overlap = Overlap(work, self.device)
        finished = [layer for layer in plan.all_layers if layer.name in work]
        self.plan, self.work, self.callback = plan, work, callback
        self.resumed = self.done = len(finished)
        self.stage = ""
        self.weights = sum(layer.numel for layer in finished)
        self.total, self.all_weights = len(plan.all_layers), sum(layer.numel for layer in plan.all_layers)

    def tell(self, stage: str, name: str = "", worker: str = "") -> None:
        """Report the present state."""
        self.stage = stage
        far = self.done, self.total, self.weights, self.all_weights, self.resumed
        self.callback(Progress(stage, name, *far, worker))

    def count(self, weights: int) -> None:
        """A layer of so many weights is finished."""
        self.done, self.weights = self.done + 1, self.weights + weights

    def missing(self, layers: Iterable[PlannedLayer]) -> list[PlannedLayer]:
        """Those of the layers that have no part yet, all that is finished having been written."""
        self.overlap.settle()
        return [layer for layer in layers if layer.name not in self.work]

    def compress(
        self,
        layer: PlannedLayer,
        second_moment: torch.Tensor | None = None,
        drift: torch.Tensor | None = None,
        notes: tuple[str, ...] = (),
        tokens: int | None = None,
    ) -> None:
        """Approximate one layer (`approximated`) and keep it in the work folder."""
        self.tell("compressing", layer.name)
        with given_back():
            read = self.overlap.reader(layer)
            result, measurement = approximated(
                layer, self.plan, second_moment, drift, notes, tokens, device=self.device, read=read
            )
        self.overlap.write(layer.name, result.tensors, measurement)
        self.count(layer.numel)


def compress_streaming(job: Job) -> None:
    """Compress every planned layer that has no part yet, in the order of the files; one layer in memory."""
    in_order = sorted(job.plan.all_layers, key=lambda layer: (layer.weight.file.name, layer.weight.start))
    missing = job.missing(in_order)
    job.overlap.expect(missing)
    for layer in missing:
        job.compress(layer)
    job.overlap.settle()


def norm_moment(layer: PlannedLayer, plan: Plan) -> torch.Tensor | None:
    """The diagonal second moment [n] that the norm in front of the layer promises, None if there is none."""
    if layer.feed is None:
        return None
    return layer.feed.read_second_moment(plan.arrangement.weights.get, layer.shape[1])


def _reader(layer: PlannedLayer, device: torch.device) -> Callable[[int, int], torch.Tensor]:
    """Some rows of a weight at a time; one that is computed from others is computed once, and held."""
    stored = layer.weight
    if isinstance(stored, Entry):
        return lambda start, end: stored.rows(start, end).read().flatten(1).to(device)
    whole = layer.read()
    return lambda start, end: whole[start:end].to(device)


def approximated(
    layer: PlannedLayer,
    plan: Plan,
    second_moment: torch.Tensor | None,
    drift: torch.Tensor | None = None,
    notes: tuple[str, ...] = (),
    tokens: int | None = None,
    *,
    device: torch.device = CPU,
    read: Callable[[], torch.Tensor] | None = None,
) -> tuple[Approximation, Measurement]:
    """One layer as it is stored, and what was measured on it.

    With a drift the codes stand for the weight that makes up for it (`solver.drift`), and the output error is the
    error against that weight: what rounding does to the layer's output; the weight error is against the original.

    Without a second moment from data, what the norm in front promises takes its place, unless calibration is
    off; an output error under that promise would be no measurement, and is not reported.

    ``tokens`` is how many inputs the second moment is made of: told, and nothing else. All is worked out on the
    device; where that runs out of memory the layer is begun again, less of it at a time. ``read`` gives the weight
    where it is at hand.
    """
    measured = second_moment is not None
    with located(layer.name):
        if not measured and layer.config.calibration != "none":
            second_moment = norm_moment(layer, plan)
        given = second_moment
        if layer.at_once < layer.numel and not measured:
            rows = _reader(layer, device)
            result = halving(lambda: approximate_portions(rows, layer.shape, layer.config, given), device)
            return result, Measurement(result.weight_error, None, notes + result.notes, tokens)
        weight = read or layer.read
        result = halving(lambda: _fitted(weight, device, layer.config, given, drift), device)
    error = result.output_error if measured else None
    return result, Measurement(result.weight_error, error, notes + result.notes, tokens)


def _fitted(
    read: Callable[[], torch.Tensor],
    device: torch.device,
    config: FourierConfig,
    moment: torch.Tensor | None,
    drift: torch.Tensor | None,
) -> Approximation:
    if drift is None:
        return approximate(read().to(device), config, moment)
    assert moment is not None
    moment = moment.to(device)
    target = corrected_weight(read().to(device), moment, drift.to(device))
    # Read again rather than kept: memory is counted in copies of it.
    return approximate(target, config, moment, original=lambda: read().to(device))


def assemble(
    plan: Plan, config: FourierConfig, work: WorkFolder, attention_density: dict[str, list[float]] | None = None
) -> None:
    """Write the new model folder from the parts and the rest of the source, and give it its name.

    Weight files hold one tensor in memory at a time. Names are those of the modules.
    """
    rest = {skipped.name: skipped.reason for skipped in plan.not_compressed}
    metadata = Metadata(config, not_compressed=rest, budget=plan.budget, attention_density=attention_density)
    items = _items(plan, work, metadata)
    with disk_errors(work.path):
        work.result.mkdir()
        note = {ORIGINAL_BYTES: str(plan.source.nbytes), NAMES: names_digest(item.name for item in items)}
        _write_shards(work.result, items, note)
        kept = {key: value for key, value in plan.source.config.items() if key != "transformers_weights"}
        config_json = {**kept, "quantization_config": metadata.to_dict()}
        write_text(work.result / "config.json", json.dumps(config_json, indent=2) + "\n")
        ledger.write(work.result, plan.ledger)
        tokens = {layer.name: work.measurement(layer.name).tokens for layer in plan.layers}
        if any(count is not None for count in tokens.values()):
            record_tokens(work.result, {name: count for name, count in tokens.items() if count is not None})
        for path in beside(plan.source.home):
            target = work.result / path.relative_to(plan.source.home)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        if plan.source.processor:
            path = work.result / "processor_config.json"
            fields = read_object(path) if path.is_file() else {}
            write_text(path, json.dumps({**fields, **plan.source.processor}, indent=2) + "\n")
    work.finish()


def _items(plan: Plan, work: WorkFolder, metadata: Metadata) -> list[Item]:
    """Everything the new checkpoint holds; records and codebooks go into the metadata."""
    items: list[Item] = []
    for layer in plan.all_layers:
        entries = work.entries(layer.name)
        measurement = work.measurement(layer.name)
        errors = (measurement.weight_error, measurement.output_error)
        predicted = (layer.sensitivity, layer.predicted_loss)
        metadata.layers[layer.name] = LayerRecord(layer.layout, *errors, *predicted, layer.embedding)
        books = {prefix + "codebook": part.codebook for prefix, part in layer.layout.parts().items()}
        items += [Item.copy(entry, f"{layer.name}.{key}") for key, entry in entries.items() if key not in books]
        for key, book in books.items():
            if key in entries and book not in metadata.codebooks:
                codebook = entries[key].read()
                metadata.codebooks[book] = codebook_digest(codebook)
                items.append(Item.of(codebook_key(book), codebook))
    return items + [Item.copy(stored, name) for name, stored in plan.kept.items()]


def _write_shards(folder: Path, items: list[Item], note: dict[str, str]) -> None:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in sorted(items, key=lambda item: item.name):
        if shards[-1] and size + item.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], note)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, note)
        weight_map.update({item.name: name for item in shard})
    index = {"metadata": {"total_size": sum(item.nbytes for item in items)}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
