"""A model is trained back: what changes, what is stored, what a kill costs, and what ends a run."""

import dataclasses
import hashlib
import json
import shutil
import warnings

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import llava_fa
from llava_fa import FourierError
from llava_fa.data.rows import Rows
from llava_fa.hub import larger
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.weights import Weights
from llava_fa.nn.factored_linear import packed_layers
from llava_fa.train.data import Collator, Conversations
from llava_fa.train.recover import recover
from llava_fa.train.settings import TrainingSettings

FAST = TrainingSettings(steps=4, batch=2, save_every=2, log_every=1, rate=3e-3, cross_entropy=0)


def data(rows):
    return lambda processor, most: Conversations(Rows(str(rows)), processor, max_length=most)


def changed(settings=FAST, **more):
    return dataclasses.replace(settings, **more)


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "training.json")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def distance(folder, original, rows):
    """Divergence from the original over all rows."""
    from llava_fa.hub.loading import load
    from llava_fa.train.loss import ModelTeacher, RecoveryLoss

    (model, processor), (teacher, _) = (load(path, "cpu", torch.float32) for path in (folder, original))
    items = data(rows)(processor, 256)
    with torch.no_grad():
        return RecoveryLoss(ModelTeacher(teacher))(model, Collator(0)(list(items)))["divergence"].item()


class KilledError(Exception):
    pass


def killing(step):
    def report(row):
        if row["step"] == step:
            raise KilledError

    return report


@pytest.fixture(scope="module")
def trained(compressed, original, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "trained"
    return out, recover(compressed, out, data(rows), changed(rank=2, steps=6), teacher=original)


def test_little_is_trained_and_the_answers_come_nearer_the_originals(trained, compressed, original, rows):
    out, report = trained
    assert distance(out, original, rows) < 0.75 * distance(compressed, original, rows)
    assert report.steps == 6
    assert sum(report.by_part.values()) == report.trainable
    assert report.by_part["factors"] > report.by_part["norms"] > 0
    model = helpers.random_llava()
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.share == report.trainable / report.total < 0.3


def test_the_result_is_a_compressed_model(trained, compressed, original):
    out, report = trained
    before, after = inspect_model(compressed), inspect_model(out)
    assert {layer.rank for layer in after.layers} == {2}
    assert after.rank == 2
    assert after.bits_per_weight == report.bits_per_weight > before.bits_per_weight
    assert after.training["steps"] == 6
    assert before.training is None
    assert after.compressed_bytes == report.compressed_bytes
    model = LlavaForConditionalGeneration.from_pretrained(out)
    start = LlavaForConditionalGeneration.from_pretrained(compressed)
    true = dict(LlavaForConditionalGeneration.from_pretrained(original).named_modules())
    for (name, layer), (_, was) in zip(packed_layers(model), packed_layers(start), strict=True):
        assert torch.equal(layer.codes, was.codes)
        assert layer.left.dtype == torch.int8
        weight = true[name].weight.float()
        error = (layer.dequantize() - weight).norm() / weight.norm()
        assert layer.weight_error == pytest.approx(error.item(), rel=1e-3)
    norm = "model.language_model.norm.weight"
    assert not torch.equal(model.get_parameter(norm), start.get_parameter(norm))
    inputs = helpers.inputs_for(helpers.processor())
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_what_training_does_not_touch_is_carried_over(original, rows, tmp_path):
    """Tensors that no module has, and the ledger of the original."""
    folder, small, out = (tmp_path / name for name in ("in", "small", "out"))
    shutil.copytree(original, folder)
    tensors = {**load_file(folder / "model.safetensors"), "mtp.weight": torch.ones(4, 4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llava_fa.compress(folder, small, llava_fa.FourierConfig(bits=2, refine_passes=0))
    report = recover(small, out, data(rows), changed(steps=1), teacher=folder)
    assert torch.equal(load_file(out / "model.safetensors")["mtp.weight"], torch.ones(4, 4))
    before, after = inspect_model(small), inspect_model(out)
    assert after.source_ledger == before.source_ledger
    assert after.ledger.nbytes == (out / "model.safetensors").stat().st_size
    names, was = ({account.name for account in one.ledger.tensors} for one in (after, before))
    assert names == was
    assert after.compressed_bytes == report.compressed_bytes


def test_an_adapter_beside_packed_weights_is_not_left_out(compressed, rows, tmp_path):
    shutil.copytree(compressed, tmp_path / "in")
    (tmp_path / "in" / "adapter_config.json").write_text("{}")
    with pytest.raises(FourierError, match="the trained model would lose it"):
        recover(tmp_path / "in", tmp_path / "out", data(rows), FAST)
    assert not list(tmp_path.glob("out*"))


def test_a_run_does_not_go_on_with_another_adapter(original, rows, tmp_path):
    peft = pytest.importorskip("peft")
    folder = tmp_path / "in"
    shutil.copytree(original, folder)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration.from_pretrained(original)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own, of names that transformers has given up
            peft.get_peft_model(model, config).save_pretrained(folder)
        expected = pytest.raises(FourierError, match="another model") if seed else pytest.raises(KilledError)
        with expected:
            recover(folder, tmp_path / "out", data(rows), changed(cross_entropy=1.0), report=killing(3))


def test_a_trained_model_is_trained_on(trained, rows, tmp_path):
    out, first = trained
    report = recover(out, tmp_path / "again", data(rows), FAST)
    assert report.bits_per_weight == first.bits_per_weight
    assert set(report.history[0]) >= {"cross_entropy", "loss"}
    assert "divergence" not in report.history[0]


def test_a_kill_costs_nothing(compressed, original, rows, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    recover(compressed, whole, data(rows), FAST, teacher=original)
    with pytest.raises(KilledError):
        recover(compressed, killed, data(rows), FAST, teacher=original, report=killing(3))
    assert not killed.exists()
    seen = []
    recover(compressed, killed, data(rows), FAST, teacher=original, report=lambda row: seen.append(row["step"]))
    assert seen == [3, 4]
    assert digest(whole) == digest(killed)
    assert not (tmp_path / "killed.partial").exists()


def test_a_run_is_resumed_with_what_it_began_with(compressed, original, rows, tmp_path):
    with pytest.raises(KilledError):
        recover(compressed, tmp_path / "out", data(rows), FAST, teacher=original, report=killing(3))
    with pytest.raises(FourierError, match=r"another settings.rate.*--fresh"):
        recover(compressed, tmp_path / "out", data(rows), changed(rate=1e-2), teacher=original)
    other = tmp_path / "other"
    llava_fa.compress(original, other, llava_fa.FourierConfig(bits=2, seed=1))
    with pytest.raises(FourierError, match="another model"):
        recover(other, tmp_path / "out", data(rows), FAST, teacher=original)
    # a checkpoint that was copied in by hand
    checkpoints = tmp_path / "out.partial" / "training"
    with pytest.raises(KilledError):
        recover(other, tmp_path / "two", data(rows), FAST, teacher=original, report=killing(3))
    shutil.rmtree(tmp_path / "two.partial" / "training")
    shutil.copytree(checkpoints, tmp_path / "two.partial" / "training")
    with pytest.raises(FourierError, match="this checkpoint is of another model"):
        recover(other, tmp_path / "two", data(rows), FAST, teacher=original)
    report = recover(other, tmp_path / "two", data(rows), FAST, teacher=original, fresh=True)
    assert report.steps == 4


def test_a_loss_that_is_no_number_stops_the_run(compressed, rows, tmp_path):
    def spoil(loss, model):
        calls = []

        def spoilt(model, inputs):
            calls.append(1)
            terms = loss(model, inputs)
            return terms if len(calls) < 4 else {**terms, "loss": terms["loss"] * float("nan")}

        return spoilt

    with pytest.raises(
        FourierError, match=r"not finite at step 4: the loss \(loss\); the last good state is .*checkpoint-2"
    ):
        recover(compressed, tmp_path / "out", data(rows), FAST, wrap_loss=spoil)
    assert recover(compressed, tmp_path / "out", data(rows), FAST).steps == 4  # mended: goes on from there


def test_a_gradient_that_is_no_number_spoils_no_checkpoint(compressed, rows, tmp_path):
    def spoil(loss, model):
        calls = []

        def spoilt(model, inputs):
            calls.append(1)
            terms = loss(model, inputs)
            if len(calls) == 4:  # finite itself: √0 · 0, whose derivative is ∞ · 0
                terms["loss"] = terms["loss"] + (terms["loss"] * 0).sqrt() * 0
            return terms

        return spoilt

    with pytest.raises(FourierError, match=r"not finite at step 4: the gradient; .*checkpoint-2"):
        recover(compressed, tmp_path / "out", data(rows), FAST, wrap_loss=spoil)
    assert recover(compressed, tmp_path / "out", data(rows), FAST).steps == 4


def test_a_teacher_with_another_tokenizer(compressed, original, rows, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(original, other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(FourierError, match="another tokenizer"):
        recover(compressed, tmp_path / "out", data(rows), FAST, teacher=other)


def test_a_teacher_of_another_size(compressed, rows, tmp_path):
    other = helpers.save_llava(tmp_path / "teacher", model=helpers.random_llava(hidden=64))
    with pytest.raises(FourierError, match=r"has a layer of .* the teacher one of"):
        recover(compressed, tmp_path / "out", data(rows), changed(rank=1), teacher=other)


def test_a_bad_row_stops_the_run_or_is_counted(compressed, rows, tmp_path):
    folder = tmp_path / "rows"
    shutil.copytree(rows.parent, folder)
    (folder / "7.png").write_bytes(b"no picture")
    with pytest.raises(FourierError, match=r"data.json row 7: .* cannot be read"):
        recover(compressed, tmp_path / "out", data(folder / "data.json"), changed(steps=6))

    def lenient(processor, most):
        return Conversations(Rows(str(folder / "data.json")), processor, max_length=most, skip_bad_rows=True)

    report = recover(compressed, tmp_path / "two", lenient, changed(steps=6, skip_bad_rows=True))
    assert report.rows_left_out == [7]


@pytest.mark.parametrize(
    "settings",
    [
        changed(rank=2),
        changed(cache_teacher=16),
        changed(bf16=True, checkpointing=True, accumulate=2, hidden=0.5),
        changed(parts=("norms",), rank=0),
    ],
    ids=["factors", "cached", "bf16", "norms"],
)
def test_other_ways(compressed, original, rows, tmp_path, settings):
    recover(compressed, tmp_path / "out", data(rows), settings, teacher=original)
    assert distance(tmp_path / "out", original, rows) < distance(compressed, original, rows)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    start = LlavaForConditionalGeneration.from_pretrained(compressed)
    pairs = zip(packed_layers(model), packed_layers(start), strict=True)
    assert all(torch.equal(a.codes, b.codes) for (_, a), (_, b) in pairs)


def test_a_model_that_is_not_compressed(original, rows, tmp_path):
    report = recover(original, tmp_path / "out", data(rows), changed(parts=("all",), rate=1e-2))
    assert report.share == 1
    assert report.bits_per_weight is None
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert not packed_layers(model)
    with pytest.raises(FourierError, match="nothing of factors"):
        recover(original, tmp_path / "two", data(rows), changed(parts=("factors",)))


@pytest.mark.slow
def test_codes_of_trellis_and_paper(original, rows, tmp_path):
    for name, config in (
        ("trellis", llava_fa.FourierConfig(bits=1.5, codes="trellis")),
        ("paper", llava_fa.FourierConfig(method="paper", bits=3, rank=1)),
    ):
        llava_fa.compress(original, tmp_path / name, config)
        out = tmp_path / f"{name} out"
        recover(tmp_path / name, out, data(rows), changed(rank=2), teacher=original)
        assert distance(out, original, rows) < distance(tmp_path / name, original, rows)
        assert {layer.rank for layer in inspect_model(out).layers} == {2}


def test_settings_that_cannot_be():
    for bad, message in (
        ({"steps": 0}, "steps is 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"warmup": 2}, "warmup is 2"),
        ({"cross_entropy": 0, "divergence": 0}, "no term"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"rank": -1}, "rank is -1"),
        ({"steps": True}, "steps is True"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": None}, "steps is None"),
        ({"steps": 10**400}, "steps is 1000"),
        ({"batch": 10**30}, "batch is 1000"),
        ({"workers": 10**9}, "workers is 1000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"rank": 1.0}, "rank is 1.0"),
        ({"max_length": "9"}, "max_length is '9'"),
        ({"rate": 0}, "rate is 0"),
        ({"rate": 10**400}, "rate is 1000"),
        ({"hidden": float("inf")}, "hidden is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ):
        with pytest.raises(FourierError, match=message):
            TrainingSettings(**bad)


def test_out_is_never_overwritten(compressed, rows, tmp_path):
    with pytest.raises(FourierError, match="exists already"):
        recover(compressed, tmp_path, data(rows), FAST)


def test_a_teacher_larger_than_memory_is_asked_once(compressed, original, rows, tmp_path, monkeypatch):
    settings = changed(rank=2, cache_teacher=16)
    recover(compressed, tmp_path / "whole", data(rows), settings, teacher=original)
    monkeypatch.setattr(larger, "_room", lambda *_: 0)
    entered, true = [], Weights.entered

    def note(self, path, *more):
        entered.append(path)
        return true(self, path, *more)

    monkeypatch.setattr(Weights, "entered", note)
    recover(compressed, tmp_path / "streamed", data(rows), settings, teacher=original)
    assert digest(tmp_path / "streamed") == digest(tmp_path / "whole")
    assert entered.count("model.language_model.layers.0") == 1  # for all samples at once
    for other in ({"hidden": 1.0}, {"cache_teacher": 0}):
        with pytest.raises(FourierError, match=r"does not fit in memory.*--cache-teacher"):
            recover(compressed, tmp_path / "other", data(rows), changed(rank=2, **other), teacher=original, fresh=True)
