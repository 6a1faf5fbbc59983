"""The report: what it shows is what inspect and eval say, and nothing in it can break the page."""

import dataclasses
import datetime
import html.parser
import json
import re
import shutil

import helpers
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import llava_fa
from llava_fa.cli.main import app
from llava_fa.eval.metrics import normalise
from llava_fa.eval.report import answers, charts, models
from llava_fa.eval.report.collect import Findings, Settings, chosen_layers, collect
from llava_fa.eval.report.markup import Html, join, tag
from llava_fa.eval.report.page import LARGEST, page
from llava_fa.eval.spectra import Originals, singular_values, spectra
from llava_fa.hub.inspect import inspect_model, spending
from llava_fa.hub.source import open_source

HOSTILE = "</dd><script>alert('a')</script><img src=x onerror=\"b\"> & ]]> http://evil.example"
VOID = {"meta", "img", "br", "link"}


class Strict(html.parser.HTMLParser):
    """Every element is closed in order; collects names, ids, attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.names, self.ids, self.attributes = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.attributes += [(name, key, value) for key, value in attributes]
        self.ids += [value for key, value in attributes if key == "id"]
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.names.append(name)
        self.attributes += [(name, key, value) for key, value in attributes]

    def handle_endtag(self, name):
        assert self.open.pop() == name


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small original, and two models compressed from it: plain, and under a budget."""
    place = tmp_path_factory.mktemp("report")
    original = helpers.save_llava(place / "original", dtype=torch.bfloat16)
    llava_fa.compress(original, place / "three", llava_fa.FourierConfig(bits=3, rank=2))
    done = run("compress", original, place / "mixed", "--bits", "2.9")
    assert done.exit_code == 0, done.output
    return place


@pytest.fixture(scope="module")
def collected(folders):
    """The whole of it, measured on the small models."""
    chosen = Settings(limit=9, divergence=100, layers=("multi_modal_projector.linear_1",))
    names = [str(folders / name) for name in ("three", "mixed")]
    return collect(names, str(folders / "original"), chosen, folders / "work")


@pytest.fixture(scope="module")
def text(collected):
    return page(collected, ["llava-fa report three mixed"], datetime.date(2026, 11, 21))


def rows_of(text, caption):
    """Cells of the table with this caption."""
    (found,) = re.findall(rf"<table><caption>{re.escape(caption)}</caption>(.*?)</table>", text, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", found, re.S)]
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in cells]


def test_it_is_one_whole_document_that_asks_for_nothing(text):
    found = Strict(text)
    assert len(text.encode()) < LARGEST
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "iframe", "object", "embed"} & set(found.names)
    for name, key, value in found.attributes:
        assert not key.startswith("on"), (name, key)
        if key in ("href", "src", "fill") or (key == "style" and value):
            assert value.startswith(("#", "data:", "url(#")), (name, key, value)
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    assert {value for _, key, value in found.attributes if key == "href" and value != "data:,"} <= {
        f"#{name}" for name in found.ids
    }
    assert all(f"url(#{name})" in text or not name.startswith("h") for name in found.ids if name in ("h0", "h6", "h7"))
    assert "prefers-color-scheme: dark" in text


def test_everybody_can_read_it(text):
    found = Strict(text)
    assert '<html lang="en">' in text
    assert text.count('role="img"') == text.count("<svg><title>") + len(
        re.findall(r"<svg [^>]*role=\"img\"><title>", text)
    )
    assert all(value for name, key, value in found.attributes if (name, key) == ("img", "alt"))
    assert found.names.count("h1") == 1
    assert found.names.count("img") == 2 * 10


def test_figures_are_those_of_inspect(text, folders):
    glance = {row[0]: row for row in rows_of(text, "The models at a glance")[1:]}
    for name in ("three", "mixed"):
        report = inspect_model(folders / name)
        assert glance[name][1] == f"{report.bits_per_weight:.3f}"
        assert glance[name][3] == f"{report.compression_ratio:.2f}×"
        layers = {row[0]: row for row in rows_of(text, f"Layers of {name}")[1:]}
        assert len(layers) == len(report.layers) == 28
        for layer in report.layers:
            row = layers[layer.name.removeprefix("model.")]
            assert row[3] == f"{layer.bits_per_weight:.3f}"
            assert float(row[5]) == pytest.approx(layer.weight_error, rel=0.01)
    why = {row[0]: row for row in rows_of(text, "What each layer of mixed was given, and why")[1:]}
    for layer in inspect_model(folders / "mixed").layers:
        assert why[layer.name.removeprefix("model.")][4:] == [f"{layer.sensitivity:.3g}", f"{layer.predicted_loss:.3g}"]
    assert "three: every layer was given the same bits" in text


def test_bytes_add_up(folders, tmp_path):
    plain = spending(folders / "original")
    assert set(plain) == {"dense layers", "embeddings", "other"}
    for name in ("original", "three", "mixed"):
        assert sum(spending(folders / name).values()) == inspect_model(folders / name).compressed_bytes
    assert spending(folders / "three")["low rank"] > 0
    assert "low rank" not in spending(folders / "mixed")
    llava_fa.compress(folders / "original", tmp_path / "casp", llava_fa.FourierConfig(bits=3), casp=llava_fa.Casp())
    llava_fa.compress(folders / "original", tmp_path / "paper", llava_fa.FourierConfig(method="paper", bits=3, rank=2))
    for name in ("casp", "paper"):
        assert sum(spending(tmp_path / name).values()) == inspect_model(tmp_path / name).compressed_bytes


def test_scores_are_those_of_eval(folders, text, tmp_path):
    told = json.loads(run("eval", folders / "three", "--limit", "9", "--json").stdout)
    rows = {row[0]: row for row in rows_of(text, "Scores of suite world")[1:]}
    for task, result in told["tasks"].items():
        low, high = result["interval"]
        assert rows[task][3] == f"{100 * result['score']:.1f} ({100 * low:.1f}–{100 * high:.1f})"
    # a result can be given in the place of asking again
    (tmp_path / "eval.json").write_text(json.dumps({**told, "score": 0.4321, "task": "given"}))
    found = collect([str(tmp_path / "eval.json")], None, Settings(limit=0), tmp_path / "work")
    assert found.runs[0].scores["given"]["accuracy"] == 0.4321
    assert found.runs[0].report.bits_per_weight == inspect_model(folders / "three").bits_per_weight
    assert not (tmp_path / "work").exists()
    for bad in ("[]", "{}", '{"tasks": {"a": {"score": 7, "questions": 1}}, "score": 0, "model": "x"}', "no"):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(llava_fa.FourierError, match=r"what `llava-fa eval --json` wrote"):
            collect([str(tmp_path / "bad.json")], None, Settings(limit=0), tmp_path / "work")


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ((0.97, 0.5), "The smallest that keeps 95 %, three, takes"),
        ((0.97, 0.96), "The smallest, mixed, takes"),
        ((0.5, 0.4), "The smallest, mixed, takes"),
    ],
)
def test_the_first_sentence_is_on_the_smallest_model_that_is_still_good(collected, kept, said):
    shares = dict(zip([run.name for run in collected.runs], (1.0, *kept), strict=True))
    runs = [dataclasses.replace(run, scores={"world": {"accuracy": shares[run.name]}}) for run in collected.runs]
    told = str(answers.headline(dataclasses.replace(collected, runs=runs, original=runs[0])))
    assert said in told
    assert f"keeps {100 * shares[said.split(', ')[1]]:.1f} % of the original" in told


def test_divergence_by_position(collected):
    """Means over positions, weighted by how many answers reach them, are the mean over the tokens that are shown."""
    for run_ in collected.runs[1:]:
        rows = answers.positions(run_)
        assert len(run_.divergence) == len(run_.answers) >= 10
        mean = sum(mean * count for _, mean, _, count in rows) / sum(count for *_, count in rows)
        shown = [value for row in run_.divergence for value in row[:24]]
        assert mean == pytest.approx(sum(shown) / len(shown))
        assert all(value >= -1e-5 for row in run_.divergence for value in row)
    three, mixed = (answers.mean_divergence(run_) for run_ in collected.runs[1:])
    assert three > 0
    assert mixed > 0


def test_the_original_does_not_differ_from_itself(folders, tmp_path):
    shutil.copytree(folders / "original", tmp_path / "copy")
    found = collect(
        [str(tmp_path / "copy")], str(folders / "original"), Settings(limit=9, divergence=4), tmp_path / "w"
    )
    (same,) = found.runs[1:]
    assert answers.mean_divergence(same) == pytest.approx(0.0, abs=1e-6)
    assert same.differing == 0


def test_differing_answers_come_first(collected):
    for run_ in collected.runs[1:]:
        found = [(normalise(d.original) != normalise(d.compressed), d.kl) for d in run_.differences]
        assert len(found) == 10
        assert found == sorted(found, reverse=True)


def test_hostile_answers_stay_text(collected):
    runs = [dataclasses.replace(run_) for run_ in collected.runs]
    bad = [dataclasses.replace(d, compressed=HOSTILE, original=HOSTILE) for d in runs[1].differences]
    runs[1] = dataclasses.replace(runs[1], name=HOSTILE, differences=bad)
    found = Findings(runs, runs[0], collected.settings, {})
    text = page(found, [HOSTILE], datetime.date(2026, 11, 21))
    parsed = Strict(text)
    assert "script" not in parsed.names
    assert "onerror" not in {key for _, key, _ in parsed.attributes}
    assert text.count("&lt;/dd&gt;&lt;script&gt;alert(") >= 20
    assert tag("p", HOSTILE, title=HOSTILE).count("<") == 2
    assert join([Html("<b>"), "<b>"]) == "<b>&lt;b&gt;"


def test_spectra_against_plain_svd(folders):
    originals = Originals(open_source(folders / "original"))
    (name,) = chosen_layers(inspect_model(folders / "mixed"), ["*layers.0.self_attn.q_proj*"])[:1]
    found = spectra(originals, folders / "mixed", name)
    record = {layer.name: layer for layer in inspect_model(folders / "mixed").layers}[name]
    assert found.weight_error == pytest.approx(record.weight_error, rel=1e-3)
    exact = torch.linalg.svdvals(originals(name))
    assert found.singular["weight"] == pytest.approx((exact / exact[0]).tolist(), rel=1e-4)
    assert found.singular["error"][0] < 1
    assert sum(found.histogram["coded"]) == pytest.approx(1.0, abs=1e-5)
    z = torch.randn(5, 9, dtype=torch.complex64)
    assert torch.allclose(singular_values(z), torch.linalg.svdvals(z), rtol=1e-4)
    with pytest.raises(llava_fa.FourierError, match="matches 'nothing'"):
        chosen_layers(inspect_model(folders / "mixed"), ["nothing"])


def test_outliers_are_spread_by_the_transform(folders, tmp_path):
    """One large weight in a row: kurtosis falls to a Gaussian's; the orthogonal transform keeps singular values."""
    model = helpers.random_llava(hidden=96)
    weight = model.model.multi_modal_projector.linear_2.weight
    with torch.no_grad():
        weight[:, 3] *= 30
    original = helpers.save_llava(tmp_path / "original", model=model)
    config = llava_fa.FourierConfig(bits=3, only=("multi_modal_projector.linear_2",), calibration="none")
    llava_fa.compress(original, tmp_path / "out", config)
    (layer,) = inspect_model(tmp_path / "out").layers
    found = spectra(Originals(open_source(original)), tmp_path / "out", layer.name)
    assert found.kurtosis["weight"] > 10
    assert found.kurtosis["coded"] < 5


def test_the_command_writes_resumes_and_says_what_is_missing(folders, tmp_path):
    out = tmp_path / "r.html"
    done = run("report", folders / "three", "--limit", "0", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["bytes"] == out.stat().st_size
    assert told["models"][0]["bits_per_weight"] == inspect_model(folders / "three").bits_per_weight
    shown = out.read_text()
    assert "give --original" in shown
    assert f"llava-fa report {folders / 'three'} --out {out} --limit 0" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    for args, message in (
        (["--out", tmp_path / "no" / "r.html"], "no such folder"),
        (["--out", tmp_path], "this is a folder"),
        (["--out", out, "--original", folders / "three"], "the original is a compressed model"),
    ):
        refused = run("report", folders / "three", "--limit", "0", *args)
        assert refused.exit_code == 1
        assert message in refused.output


def test_a_killed_report_goes_on(folders, tmp_path, monkeypatch):
    chosen = Settings(limit=9, divergence=3)
    arguments = ([str(folders / "three")], str(folders / "original"), chosen, tmp_path / "work")
    with monkeypatch.context() as context:
        context.setattr("llava_fa.eval.report.collect._spectra", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect(*arguments)
    monkeypatch.setattr("llava_fa.eval.report.collect.load", lambda *_: pytest.fail("asked again"))
    found = collect(*arguments)
    assert found.runs[1].divergence
    assert len(found.runs[1].spectra) == 3


def test_the_command_of_a_folder_is_kept_and_shown(folders, text):
    told = inspect_model(folders / "mixed").provenance
    assert told["command"] == f"llava-fa compress {folders / 'original'} OUT --bits 2.9"
    assert f"llava-fa compress {folders / 'original'} {folders / 'mixed'} --bits 2.9" in text
    assert inspect_model(folders / "three").provenance is None
    assert "not recorded: through the Python API" in text


def test_places_of_layers():
    assert models.place("model.language_model.layers.12.mlp.experts.3.up_proj") == ("mlp.experts.*.up_proj", 12)
    assert models.place("model.multi_modal_projector.linear_1") == ("linear_1", -1)


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (-5, 5, False), (1e-6, 1, True), (2.02, 3.7, False)])
def test_ticks_are_round_and_inside(low, high, log):
    found = charts.ticks(low, high, log=log)
    assert 3 <= len(found) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert all(len(charts.label(tick)) <= 5 for tick in found)


def test_a_picture_is_made_small():
    assert len(answers.embedded(Image.new("RGB", (3000, 2000)))) < 2000


def test_the_demo_says_commands_that_make_the_same_bytes(tmp_path):
    """`compress --calibration world` draws what the demo draws."""
    from llava_fa.cli.demo import equivalent
    from llava_fa.world.samples import calibration_samples

    only = "multi_modal_projector"
    config = llava_fa.FourierConfig(bits=2, seed=3, only=(only,))
    llava_fa.compress("tiny", tmp_path / "a", config, calibration_samples(2, 3))
    words = equivalent("tiny", "best", 2.0, 2, 3).replace("OUT", str(tmp_path / "b")).split()[1:]
    done = run(*words, "--only", only)
    assert done.exit_code == 0, done.output
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
