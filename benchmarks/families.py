"""Every architecture that transformers maps to text with pictures or sound: does it come through, what is packed.

    nice .venv/bin/python benchmarks/families.py [--only qwen3_vl …] [--again]     # writes docs/models.md

Of each a small random model (`shrunken.py`), biases and norms shaken, is saved, compressed without data and once more
on a few made-up inputs (`made_up.py`), and loaded again by an Auto class. Held against the original: every parameter
and buffer that is not packed, bit for bit; the weights of packed layers, by their error; the logits, against those of
the model with its packed layers decoded. Then a few tokens are generated, with a picture where one could be made up.
Tensors of a head that predicts several tokens, as checkpoints have them, are put beside the weights of every model and
must be there afterwards and told.

From the default configuration, on the meta device, comes what a model of the real size would be (`hub.preview`).

A process for each family, so that one that crashes or wants too much memory costs one line; a row of each is kept in
`runs/families/`, so that a killed run goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLAVA_FA_ACTIVATIONS", "exact")

HERE = Path(__file__).resolve().parent
# transformers looks for a library `kernels`, and would come upon the script of that name: it is imported without it.
sys.path = [path for path in sys.path if Path(path).resolve() != HERE]
import transformers.modeling_utils  # noqa: E402

sys.path.append(str(HERE))
import torch  # noqa: E402
from common import Row, arguments, write_json  # noqa: E402
from likeness import Broken, output_errors, unlike  # noqa: E402

ROOT = HERE.parent
CACHE, PAGE = ROOT / "runs" / "families", ROOT / "docs" / "models.md"
MEMORY = 8 << 30
"""Bytes of address space that one family may take."""
SECONDS = 300
MTP = "mtp.layers.0.input_proj.weight"
"""A tensor that no class of transformers has, named as checkpoints name it."""
WORST_ERROR = 0.2
"""At 4 bits, of a packed weight ‖W-Ŵ‖/‖W‖, of a calibrated layer `output_errors`; a mistaken layer has 1 and more."""
TOLERANCE = 1e-4
"""Of float32 logits, relative to the largest: orders of summation differ; a mistaken layer changes a tenth and more."""


def mapping() -> dict[str, str]:
    """Family → class, of both mappings."""
    from transformers.models.auto import modeling_auto

    names = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
    return {family: kind for name in names for family, kind in getattr(modeling_auto, name).items()}


def check(family: str, work: Path) -> Row:
    """One family through everything, in an empty folder; what it came to.

    Raises:
        Broken: what came out wrong; and whatever building, compressing or loading raises.
    """
    from made_up import with_picture, with_sound, words
    from shrunken import shake, small_config

    torch.manual_seed(0)
    kind = getattr(transformers, mapping()[family])
    model = kind(small_config(family)).eval()
    shake(model)
    model.to(torch.bfloat16).save_pretrained(work / "in")
    add_head(work / "in")
    if family == "qwen2_5_omni":  # the voices, without which its class does not load
        torch.save({"Chelsie": {}}, work / "in" / "spk_dict.pt")
    saved, model = model.state_dict(), kind.from_pretrained(work / "in", dtype=torch.float32).eval()
    if lost := [name for name, value in model.state_dict().items() if not torch.equal(value, saved[name].to(value))]:
        raise Broken(f"transformers loads {len(lost)} tensors other than it has saved them, such as {lost[0]}")
    asked = answering(model)
    pictured, sounding = with_picture(asked), with_sound(asked)
    row: Row = {"parameters": sum(p.numel() for p in model.parameters())}
    row |= {"picture": pictured is not None, "sound": sounding is not None}
    inputs = [pictured, with_picture(asked, seed=1) if pictured else None, words(asked), sounding]
    inputs = [one for one in inputs if takes(asked, one)]
    if not inputs:
        raise Broken("no inputs could be made up that it takes")
    row |= free(work, inputs)
    row |= calibrated_too(work, model, inputs)
    return row


def add_head(folder: Path) -> None:
    """A further weight file with a tensor that no module has, named in an index."""
    from llava_fa.hub.shards import Item, read_entries, write_file
    from llava_fa.hub.source import INDEX, SINGLE, weight_files

    names = {entry.name: entry.file.name for entry in read_entries(weight_files(folder)).values()}
    if (single := folder / SINGLE).is_file():
        single.rename(folder / "model-1.safetensors")
        names = dict.fromkeys(names, "model-1.safetensors")
    write_file(folder / "model-mtp.safetensors", [Item.of(MTP, torch.randn(64, 64).bfloat16())], {})
    write_json(folder / INDEX, {"metadata": {}, "weight_map": {**names, MTP: "model-mtp.safetensors"}})


def answering(model: Any) -> Any:
    """The part of a model that answers in text: of those that speak too, the thinker."""
    return getattr(model, "thinker", model)


def takes(model: Any, inputs: Any) -> bool:
    """Whether the model runs on these inputs, if there are any."""
    from made_up import logits

    try:
        return inputs is not None and logits(model, inputs) is not None
    except Exception:  # whatever it says of inputs that are not its own
        return False


def free(work: Path, inputs: list[Any]) -> Row:
    """Compressed without data, word embeddings too where they can be: what came of it, held against the original."""
    import llava_fa
    from llava_fa import FourierConfig, FourierError

    embeddings = 4
    try:
        report = llava_fa.compress(work / "in", work / "free", FourierConfig(bits=4), embeddings=embeddings)
    except FourierError as error:
        if "embedding" not in str(error):
            raise
        embeddings = 0
        report = llava_fa.compress(work / "in", work / "free", FourierConfig(bits=4))
    told = [skipped.reason for skipped in report.not_compressed if skipped.name == MTP]
    if len(told) != 1:
        raise Broken(f"{MTP} is told {len(told)} times")
    row = {"embeddings": bool(embeddings), "layers": len(report.layers), "mtp": told[0]}
    return row | compared(work / "in", work / "free", inputs)


def calibrated_too(work: Path, model: Any, inputs: list[Any]) -> Row:
    """Compressed on the inputs, block by block."""
    from llava_fa import FourierConfig
    from llava_fa.hub.architecture import empty_model
    from llava_fa.hub.calibrated import compress_calibrated
    from llava_fa.hub.inspect import describe
    from llava_fa.hub.plan import make_plan
    from llava_fa.hub.source import open_source
    from llava_fa.hub.streaming import Job, assemble
    from llava_fa.hub.work_folder import WorkFolder
    from llava_fa.nn.experts import unfuse

    if model is not answering(model):
        return {"calibrated": None}
    source, config = open_source(work / "in"), FourierConfig(bits=4)
    plan = make_plan(empty_model(source.folder, len(source.entries)), source, config)
    unfuse(model)
    with WorkFolder(work / "data", {}) as folder:
        compress_calibrated(Job(plan, folder, lambda _: None), model, inputs)
        assemble(plan, config, folder)
    seen = [layer for layer in describe(work / "data").layers if layer.output_error is not None]
    if not seen:
        raise Broken("no layer saw the samples")
    row = compared(work / "in", work / "data", inputs, calibrated=True)
    return {"calibrated": len(seen), "calibrated_error": row["error"]}


def compared(before: Path, after: Path, inputs: list[Any], *, calibrated: bool = False) -> Row:
    """A compressed folder loaded by an Auto class, against the original and against itself decoded.

    Args:
        calibrated: whether it was compressed on these inputs, so that packed layers are to be near on them.

    Raises:
        Broken: what differs.
    """
    from made_up import logits

    original = load(before)
    packed, decoded = load(after), load(after)
    if type(packed) is not type(original):
        raise Broken(f"loaded as {type(packed).__name__}, was {type(original).__name__}")
    decoded.dequantize()
    errors = unlike(original, packed, decoded)
    apart = 0.0
    for one in inputs:
        x, y = logits(answering(packed), one).double(), logits(answering(decoded), one).double()
        apart = max(apart, float((x - y).abs().max() / y.abs().max()))
    if not apart <= TOLERANCE:
        raise Broken(f"logits differ by {apart:.2g} from those of the decoded model")
    if hasattr(packed, "generate"):
        made = packed.generate(**starting(packed, inputs[0]), max_new_tokens=4, do_sample=False)
    else:  # it moves
        made = packed.sample_actions(**{key: x for key, x in inputs[0].items() if key != "timestep"}, num_steps=2)
    made = getattr(made, "sequences", made)
    if calibrated:
        errors |= output_errors(answering(original), answering(decoded), inputs)
    for name, error in errors.items():
        if not error <= WORST_ERROR:
            raise Broken(f"{name} is packed with an error of {error:.2g}")
    return {"error": max(errors.values()), "logits": apart, "tokens": int(made.shape[-1])}


def load(folder: Path) -> Any:
    """By the Auto class that is for nearly all of them, or the one that is for the rest, in float32.

    By the class that config.json names where no Auto class takes the configuration that is in its own list.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )

    from llava_fa.hub.architecture import quiet_transformers

    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        auto = AutoModelForImageTextToText
        if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
            auto = AutoModelForMultimodalLM
        elif type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # Evolla, whose configuration has two names
            auto = getattr(transformers, config.architectures[0])
        return auto.from_pretrained(folder, dtype=torch.float32).eval()


def starting(model: Any, inputs: Any) -> Row:
    """What a model is asked to go on from: its inputs, as its `generate` takes them, and what beside them it needs."""
    asked: Row = dict(inputs)
    if hasattr(model.config, "canvas_length"):
        asked.pop("decoder_input_ids")
    if model is not answering(model):  # in text, not in sound
        asked |= {"generation_mode": "text", "thinker_max_new_tokens": 4}
    if model.config.is_encoder_decoder:
        if getattr(model.generation_config, "decoder_start_token_id", None) is None:
            asked["decoder_start_token_id"] = 1
        if model.main_input_name != "input_ids":  # a text is what it writes
            asked.pop("input_ids", None)
    if (codec := getattr(model.config, "codec_config", None)) is not None:  # it writes down what it hears meanwhile
        asked = {"input_values": torch.randn(1, 1, 8 * codec.frame_size)}
    if getattr(
        model.config, "audio_length_per_tok", None
    ):  # a token for each moment of the sound: of some it is to write
        asked |= {key: asked[key][:, :-4] for key in ("input_ids", "attention_mask")}
    return asked


def shape(family: str) -> Row:
    """What a model of the default configuration would be at 4 bits, embeddings too."""
    from shrunken import default_config

    from llava_fa import FourierConfig, FourierError
    from llava_fa.hub.preview import preview_of
    from llava_fa.nn.experts import unfuse

    with torch.device("meta"):
        model = getattr(transformers, mapping()[family])(default_config(family))
    unfuse(model)
    try:
        made = preview_of(model, ROOT, FourierConfig(bits=4), embeddings=4)
    except FourierError as error:
        if "embedding" not in str(error):
            raise
        made = preview_of(model, ROOT, FourierConfig(bits=4))
    return {key: value for key, value in made.to_dict().items() if key != "path"}


def one(family: str) -> None:
    """This process's family: its row goes into the cache."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    row: Row = {"family": family, "class": mapping()[family]}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for key, measure in (("small", lambda: check(family, Path(folder))), ("default", lambda: shape(family))):
            try:
                row[key] = measure()
            except Exception as error:
                row[f"{key}_error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    row["seconds"] = time.monotonic() - start
    write_json(CACHE / f"{family}.json", row)


def sweep(families: list[str], again: bool) -> list[Row]:
    """The rows of these families, those that are not kept measured in a process each."""
    rows = []
    for number, family in enumerate(families, 1):
        path = CACHE / f"{family}.json"
        if again or not path.is_file():
            path.unlink(missing_ok=True)
            done = _run(family)
            if not path.is_file():
                write_json(path, {"family": family, "class": mapping()[family], "small_error": done})
        rows.append(row := json.loads(path.read_text()))
        said = row.get("small_error") or row.get("default_error") or "through"
        print(f"{number}/{len(families)} {family}: {said} ({row.get('seconds', 0):.1f} s)", flush=True)
    return rows


def transformers_quietly() -> None:
    """No progress bars between the lines."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _run(family: str) -> str:
    """Why there is no row, once the family's process has ended: a fork of this one, which has imported everything."""
    process = multiprocessing.get_context("fork").Process(target=one, args=(family,))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return f"no end within {SECONDS} s"
    return f"its process ended with {process.exitcode}"


_HEAD = """# Every family of models

Written by `benchmarks/families.py`; do not edit. {count} architectures of transformers {version}, of its
image-text-to-text and multimodal mappings; {through} of them come through.

**Through** (a small random model, biases and norms shaken): saved, compressed without data and calibrated, loaded
by an Auto class. Every tensor that is not packed is the original's to the last bit, packed weights are
within an error of {worst} at 4 bits (of calibrated layers: their outputs on the samples), float32 logits differ by at
most {tolerance:g} of the largest from those of the model with its layers decoded, and it generates. A tensor of a head
that predicts several tokens (`mtp.*`), which transformers' classes do not have, was put beside every model's weights;
it is still there afterwards, and told. *samples*: beside a text, the picture and the sound whose tensors could be made
up without the family's processor. *seen*: layers that the samples reached,
of all that are packed (embeddings included, which are fitted without data).

**At 4 bits** (transformers' default configuration on the meta device, embeddings packed at 4 bits where they can
be; the same as `llava-fa inspect CONFIG --bits 4 --embeddings 4`): *packed*, of all parameters; *linear*, of the
weights of linear layers and experts, output embeddings aside; *with experts*, what *packed* would be if stacks of
experts that stay were packed too; *ratio*, bytes of the original over those of the result; what stays, largest
first, from one in a hundred parameters on. Default configurations are often not those of a published model.

| family | through | samples | seen | M parameters | packed | linear | with experts | ratio | what stays |
|---|---|---|---|---|---|---|---|---|---|
"""


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    from shrunken import DEFAULTS

    through = sum("small" in row for row in rows)
    values = {"count": len(rows), "version": transformers.__version__, "through": through}
    text = _HEAD.format(**values, worst=WORST_ERROR, tolerance=TOLERANCE) + "".join(map(_line, rows))
    failed = [(row["family"], row[key]) for row in rows for key in ("small_error", "default_error") if key in row]
    if failed:
        lines = dict.fromkeys(f"- **{family}**: {_plain(why)}\n" for family, why in failed)
        text += "\n## Why not\n\n" + "".join(lines)
    text += "\n## Default configurations that needed a value to be built\n\n"
    return text + "".join(f"- **{family}**: {why}.\n" for family, (why, _) in sorted(DEFAULTS.items()))


def _line(row: Row) -> str:
    small, default = row.get("small"), row.get("default")
    cells = [row["family"], "yes" if small else "no"]
    if small:
        seen = "by voice" if small["calibrated"] is None else f"{small['calibrated']} of {small['layers']}"
        cells += [", ".join(kind for kind in ("picture", "sound") if small[kind]) or "text alone", seen]
    else:
        cells += ["", ""]
    if default:
        total = default["parameters"]
        experts = sum(one["elements"] for one in default["staying"] if one["reason"].startswith("fused experts"))
        cells += [f"{total / 1e6:,.0f}", f"{default['share']:.1%}"]
        cells += [f"{default['packed_linear'] / max(1, default['linear']):.1%}"]
        cells += [f"{(default['packed'] + experts) / total:.1%}", f"{default['compression_ratio']:.2f}"]
        large = [one for one in default["staying"] if one["elements"] >= total / 100]
        cells += ["; ".join(f"{_plain(one['reason'])} {one['elements'] / total:.0%}" for one in large[:3])]
    else:
        cells += [""] * 6
    return f"| {' | '.join(cells)} |\n"


def _plain(text: str) -> str:
    """Text of others, harmless in a table of Markdown."""
    return text.replace("|", "/").replace("<", "‹").replace("\n", " ")[:160]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(mapping()), metavar="FAMILY", help="these families alone")
    parser.add_argument("--again", action="store_true", help="measure anew what is kept")
    args = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers_quietly()
    rows = sweep(args.only or list(mapping()), args.again)
    if not args.only:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
