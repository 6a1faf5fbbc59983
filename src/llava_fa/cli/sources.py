"""What SOURCE is on the command line: `world`, a LLaVA-format JSON file, or a Hugging Face dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_fa.bounds import COUNT, MOST_PICTURES, from_environment
from llava_fa.cli.options import refuse

if TYPE_CHECKING:
    from llava_fa.data.rows import SampleSource
    from llava_fa.train.data import DataFactory
    from llava_fa.train.settings import TrainingSettings

WORLD = "world"
LARGEST = 10**7
"""Pictures of an epoch of the world: more would only make the order of them a list that fills the memory."""

TEXTS = 2000
"""Questions of the world that a model without eyes is trained on: there are few others."""


def check_images(source: str | None, images: Path | None) -> None:
    """Refuse an image folder beside generated samples."""
    refuse(images is not None and source == WORLD, "--images goes with a LLaVA JSON file, not with `world`")


def calibration_source(name: str, images: Path | None, count: int, seed: int) -> SampleSource:
    """``--calibration``: samples that are read when the compression needs them."""
    refuse(name == WORLD and count > MOST_PICTURES, f"at most {MOST_PICTURES} are drawn of the world", "--samples")
    from llava_fa.data.rows import SampleSource
    from llava_fa.world import calibration_samples

    return SampleSource(name, images, count, seed, draw=calibration_samples if name == WORLD else None)


def training_source(name: str, images: Path | None, count: int | None, settings: TrainingSettings) -> DataFactory:
    """``--data``: packed questions of the world, or conversations."""
    from llava_fa.data.rows import SampleSource
    from llava_fa.train.data import training_data

    if name != WORLD:
        return training_data(SampleSource(name, images), settings, count)
    from llava_fa.hub.processor import sees_pictures
    from llava_fa.world import calibration_samples
    from llava_fa.world.packed import PackedWorld

    processes = from_environment("WORLD_SIZE", 1, 1, COUNT)
    samples = settings.steps * settings.batch * settings.accumulate * processes
    pictures = min(count or samples, samples, LARGEST)

    def make(processor: Any, max_length: int) -> Any:
        if sees_pictures(processor):
            return PackedWorld(processor, pictures=pictures)
        drawn = calibration_samples(min(pictures, TEXTS), settings.seed)
        return training_data(drawn, settings)(processor, max_length)

    return make
