"""Damaged checkpoints: each is read as what it says, or refused with one error; none crashes, hangs or is read wrongly.

The seeds are fixed; a failure names its number, which reproduces it alone.
"""

import collections
import contextlib
import io
import json
import random
import shutil
import signal
import warnings

import helpers
import mutations
import pytest
import torch
from safetensors import SafetensorError, safe_open

import llava_fa
from llava_fa import FourierConfig, FourierError
from llava_fa.cli.output import print_json
from llava_fa.cli.tables import show_report
from llava_fa.config import Budget
from llava_fa.hub.complete import loaded_model, unpacked
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.shards import read_header
from llava_fa.nn.factored_linear import packed_layers

SECONDS = 30
"""That a case may take."""
FEW, MANY = "a few", pytest.param("many", marks=[pytest.mark.slow, pytest.mark.timeout(7200)])


@contextlib.contextmanager
def _promptly():
    def late(*_):
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _outcome(number, use, *args):
    """What became of a case; anything but a result or one `FourierError` fails."""
    refused = None
    try:
        with _promptly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what transformers advises on an odd configuration
            use(*args)
    except FourierError as error:
        refused = error
    except Exception as error:
        raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    assert refused is None or (refused.what and len(str(refused)) < 4000), f"case {number}: {refused}"
    return "read" if refused is None else "refused"


def _read(path):
    for entry in read_header(path)[0].values():
        list(entry.chunks())


def _inspect(folder):
    report = inspect_model(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        print_json(report.to_dict())
        show_report(report, all_layers=True)
    read = [path for path in folder.glob("*.safetensors") if path.name not in report.ledger.unread]
    assert report.ledger.nbytes == sum(path.stat().st_size for path in read)


def _load(folder):
    model = loaded_model(folder, dtype="auto")
    packed = {name for name, _ in packed_layers(model)}
    state = model.state_dict()
    for name, stored in unpacked(folder)[1].weights.items():
        if name.rpartition(".")[0] not in packed and name in state:
            expected = stored.read().to(state[name].dtype)
            assert torch.equal(torch.nan_to_num(state[name]), torch.nan_to_num(expected)), name


def _put(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _tell(what, counts):
    """For docs: `pytest -s` shows it."""
    print(f"\n{what}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name → files of a sharded original, of one in a single file, and of compressed ones."""
    root = tmp_path_factory.mktemp("whole")
    helpers.save_llava(root / "shards", dtype=torch.bfloat16, shard="40KB")
    helpers.save_llava(root / "single", dtype=torch.bfloat16)
    config = FourierConfig(bits=2, refine_passes=0)
    llava_fa.compress(root / "single", root / "packed", config, embeddings=4)
    llava_fa.compress(root / "single", root / "budget", config.replace(codes="auto"), budget=Budget(bits=3.3))
    kept = (".safetensors", "config.json", ".index.json", "ledger.json")
    return {
        folder.name: {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith(kept)}
        for folder in sorted(root.iterdir())
    }


@pytest.mark.parametrize("amount", [FEW, MANY])
def test_files_are_judged_as_by_their_library(amount, folders, tmp_path):
    """Accepted is what the library accepts, and every tensor has the bytes that it gives."""
    whole = folders["single"]["model.safetensors"]
    small = whole[: 8 + int.from_bytes(whole[:8], "little")]
    header = json.loads(small[8:])
    some = {name: header[name] for name in list(header)[:5]}
    end = max(value["data_offsets"][1] for value in some.values() if "data_offsets" in value)
    offset = min(value["data_offsets"][0] for value in some.values() if "data_offsets" in value)
    for value in some.values():
        if "data_offsets" in value:
            value["data_offsets"] = [place - offset for place in value["data_offsets"]]
    text = json.dumps(some).encode()
    text += b" " * (-len(text) % 8)
    file = len(text).to_bytes(8, "little") + text + whole[len(small) + offset : len(small) + end]
    path, counts = tmp_path / "file.safetensors", collections.Counter()
    for number in range(70_000 if amount == "many" else 700):
        random_ = random.Random(number)
        way = random_.choice((mutations.damaged_bytes, mutations.damaged_header))
        path.write_bytes(way(random_, file))
        outcome = _outcome(number, _read, path)
        try:
            with safe_open(path, "pt") as theirs:
                assert outcome == "read", f"case {number} is refused, and the library reads it"
                entries = read_header(path)[0]
                assert set(entries) == set(theirs.keys()), number
                for name in theirs.keys():  # noqa: SIM118  it is no dict
                    if not entries[name].dtype.startswith(("F4", "F6", "F8", "U16", "U32", "U64", "C64")):
                        ours = entries[name].read()
                        assert torch.equal(ours.view(torch.uint8), theirs.get_tensor(name).view(torch.uint8)), number
        except SafetensorError:
            assert outcome == "refused", f"case {number} is read, and the library refuses it"
        counts[outcome] += 1
    assert min(counts.values()) > 20
    _tell("weight files", counts)


@pytest.mark.parametrize("amount", [FEW, MANY])
def test_folders_are_inspected_or_refused(amount, folders, tmp_path):
    """`inspect` accounts for every byte of what it accepts."""
    counts = collections.Counter()
    for number in range(29_000 if amount == "many" else 150):
        random_ = random.Random(1_000_000 + number)
        folder = _put(tmp_path / "in", mutations.damage(random_, folders[random_.choice(sorted(folders))]))
        counts[_outcome(number, _inspect, folder)] += 1
    assert min(counts.values()) > 20
    _tell("folders inspected", counts)


@pytest.mark.parametrize("amount", [FEW, MANY])
def test_folders_are_loaded_as_they_are_or_refused(amount, folders, tmp_path):
    """Every parameter of a model that loads is what the files say: nothing is filled in or read from elsewhere."""
    counts = collections.Counter()
    for number in range(1_000 if amount == "many" else 12):
        random_ = random.Random(2_000_000 + number)
        folder = _put(tmp_path / "in", mutations.damage(random_, folders[random_.choice(sorted(folders))]))
        counts[_outcome(number, _load, folder)] += 1
    _tell("folders loaded", counts)
