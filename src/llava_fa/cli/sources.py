"""What SOURCE is on the command line: `world`, `self`, pictures, a LLaVA-format JSON, or a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_fa.bounds import COUNT, MOST_PICTURES, from_environment
from llava_fa.cli.options import refuse

if TYPE_CHECKING:
    from llava_fa.data.rows import SampleSource
    from llava_fa.train.data import DataFactory
    from llava_fa.train.settings import TrainingSettings

WORLD, SELF = "world", "self"
LARGEST = 10**7
"""Pictures of an epoch of the world: more would only make the order of them a list that fills the memory."""

TEXTS = 2000
"""Questions of the world that a model without eyes is trained on: there are few others."""


def check_images(source: str | None, images: Path | None) -> None:
    """Refuse an image folder beside generated samples."""
    generated = source in (WORLD, SELF)
    refuse(images is not None and generated, f"--images goes with a LLaVA JSON file, not with `{source}`")


def is_asked(name: str) -> bool:
    """Whether the model is to answer the samples of a source itself."""
    from llava_fa.data.asked import is_album

    return name == SELF or is_album(name)


def calibration_source(name: str, images: Path | None, count: int, seed: int, ask: Sequence[str] = ()) -> SampleSource:
    """``--calibration``: samples that are read when the compression needs them.

    ``ask``: questions of the user's own, for a model that is to answer itself.
    """
    generated, asked = name in (WORLD, SELF), is_asked(name)
    refuse(generated and count > MOST_PICTURES, f"at most {MOST_PICTURES} are drawn of the world", "--samples")
    refuse(bool(ask) and not asked, "--ask goes with `--calibration self` or a folder of pictures")
    from llava_fa.data.asked import Asked
    from llava_fa.data.rows import SampleSource
    from llava_fa.world import calibration_samples

    if asked:
        refuse(images is not None, "--images goes with a LLaVA JSON file, not with a folder of pictures")
        return Asked(name, None, count, seed, calibration_samples if name == SELF else None, tuple(ask))
    return SampleSource(name, images, count, seed, draw=calibration_samples if name == WORLD else None)


def training_source(name: str, images: Path | None, count: int | None, settings: TrainingSettings) -> DataFactory:
    """``--data``: packed questions of the world, or conversations."""
    from llava_fa.data.rows import SampleSource
    from llava_fa.train.data import training_data

    refuse(is_asked(name), "training needs samples with answers", "--data")
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
