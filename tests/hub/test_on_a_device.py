"""Layers fitted on another device: the same tensors, whatever memory it has, and read and written meanwhile."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from elsewhere import DEVICE, Elsewhere

import llava_fa
import llava_fa.solver.approximate as fitting
from llava_fa import FourierConfig, FourierError, native
from llava_fa.hub import calibrated, calibrated_model, streaming
from llava_fa.hub.architecture import empty_model
from llava_fa.hub.plan import PlannedLayer, make_plan
from llava_fa.hub.source import open_source
from llava_fa.hub.team import Alone
from llava_fa.hub.work_folder import Parts, WorkFolder
from llava_fa.maths import device as devices
from llava_fa.maths import metrics
from llava_fa.solver import best, portions, statistics
from llava_fa.solver.approximate import approximate
from llava_fa.solver.statistics import Drift, SecondMoment


@pytest.fixture(autouse=True)
def pytorch(monkeypatch):
    """What runs on another device runs here, too: the same bits can be asked for."""
    monkeypatch.setenv(native.SWITCH, "off")
    monkeypatch.setattr(devices, "_halved", {})


@pytest.fixture
def fits_there(monkeypatch):
    """The model stays on the CPU, where there is all that models are made of, and layers are fitted on DEVICE."""
    load = calibrated_model._load
    monkeypatch.setattr(calibrated_model, "_load", lambda source, dtype, _: load(source, dtype, torch.device("cpu")))


def out_of_memory(times, function):
    """The function, which does not find the memory the first so many times."""

    def run(*args, **kwargs):
        nonlocal times
        times -= 1
        if times >= 0:
            raise torch.OutOfMemoryError("out of memory")
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize("embeddings", [None, 2])
def test_without_data(checkpoint, tmp_path, digest, embeddings, monkeypatch):
    monkeypatch.setattr(portions, "PORTION", 1 << 10)
    config = FourierConfig(bits=3)
    llava_fa.compress(checkpoint, tmp_path / "here", config, embeddings=embeddings, device="cpu")
    with Elsewhere():
        llava_fa.compress(checkpoint, tmp_path / "there", config, embeddings=embeddings, device=DEVICE)
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


@pytest.mark.usefixtures("fits_there")
@pytest.mark.parametrize("codes", ["rings", "trellis"])
def test_with_samples(checkpoint, samples, tmp_path, digest, codes):
    config = FourierConfig(bits=2, codes=codes, refine_passes=1)
    llava_fa.compress(checkpoint, tmp_path / "here", config, samples, device="cpu")
    with Elsewhere():
        llava_fa.compress(checkpoint, tmp_path / "there", config, samples, device=DEVICE)
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_sums_are_where_inputs_are_if_there_is_room(monkeypatch):
    x, given = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    made = {}
    for room in (True, False):
        if not room:
            monkeypatch.setattr(statistics, "spare", lambda _: 7.0)
        with Elsewhere():
            sums = SecondMoment(6), SecondMoment(6, diagonal=True), Drift(6), Drift(6, weight=weight)
            for i, one in enumerate(sums):
                one.add(given.to(DEVICE)) if i < 2 else one.add(x.to(DEVICE), given.to(DEVICE))
            values = [one.value() for one in sums]
            assert {value.device for value in values} == {DEVICE if room else torch.device("cpu")}
            made[room] = [value.cpu() for value in values]
    for ours, theirs in zip(*made.values(), strict=True):
        assert torch.equal(ours, theirs)


def test_means_for_which_there_is_no_memory_are_here(monkeypatch):
    x, given = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    empty = torch.empty

    def full(*args, **kwargs):
        if kwargs.get("device") == DEVICE:
            raise torch.OutOfMemoryError("out of memory")
        return empty(*args, **kwargs)

    with Elsewhere():
        moment, drift = SecondMoment(6), Drift(6)
        moment.add(given.to(DEVICE))
        drift.add(x.to(DEVICE), given.to(DEVICE))
        expected = [moment.value().cpu(), drift.value().cpu()]
        monkeypatch.setattr(torch, "empty", full)
        found = [moment.value(spend=True), drift.value()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def layer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    return torch.randn(21, 40, generator=generator), x.T @ x / len(x)


@pytest.mark.parametrize("codes", ["rings", "trellis"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_out_of_memory_halves_the_rows(codes, calibrated, monkeypatch):
    weight, moment = layer()
    given = moment if calibrated else None
    config = FourierConfig(bits=2, codes=codes)
    expected = approximate(weight, config, given)
    seen = []

    def room_for_four(search):
        def run(*args):
            rows = next(x for x in args if isinstance(x, torch.Tensor))
            seen.append(rows.shape[1])
            if rows.shape[1] > 4:
                raise torch.OutOfMemoryError("out of memory")
            return search(*args)

        return run

    monkeypatch.setattr(devices, "_TIMES", 8)
    monkeypatch.setattr(best, "_SEARCHED", 2)
    monkeypatch.setattr(best, "ROWS", 2)
    if calibrated:
        name = "round_trellis" if codes == "trellis" else "round_with_beam"
        monkeypatch.setattr(best, name, room_for_four(getattr(best, name)))
    elif codes == "trellis":
        monkeypatch.setattr(best.trellis(4), "encode", room_for_four(best.trellis(4).encode))
    else:
        nearest = best._Problem._nearest
        few = room_for_four(lambda rows, problem: nearest(problem, rows.T))
        monkeypatch.setattr(best._Problem, "_nearest", lambda problem, rows: few(rows.T, problem))
    with Elsewhere():
        there = weight.to(DEVICE)
        moved = None if given is None else given.to(DEVICE)
        found = devices.halving(lambda: approximate(there, config, moved), DEVICE)
        assert seen[:3] == [16, 8, 4]
        assert {key: tensor.cpu().tolist() for key, tensor in found.tensors.items()} == {
            key: tensor.tolist() for key, tensor in expected.tensors.items()
        }


def test_a_layer_is_begun_again_until_it_fits(checkpoint, quick, tmp_path, digest, monkeypatch):
    llava_fa.compress(checkpoint, tmp_path / "here", quick, device="cpu")
    monkeypatch.setattr(streaming, "approximate", out_of_memory(3, streaming.approximate))
    with Elsewhere():
        llava_fa.compress(checkpoint, tmp_path / "there", quick, device=DEVICE)
        assert devices.at_a_time(1, DEVICE) == 8
        assert digest(tmp_path / "here") == digest(tmp_path / "there")
        monkeypatch.setattr(streaming, "approximate", out_of_memory(100, streaming.approximate))
        with pytest.raises(FourierError, match=r"lazy: the device ran out of memory.*--device cpu goes on"):
            llava_fa.compress(checkpoint, tmp_path / "never", quick, device=DEVICE)
    assert devices.at_a_time(1, DEVICE) == 1


@pytest.mark.usefixtures("fits_there")
@pytest.mark.parametrize("what", ["the error against the original", "the weight that the model goes on with"])
def test_so_is_what_follows(what, checkpoint, samples, quick, tmp_path, digest, monkeypatch):
    llava_fa.compress(checkpoint, tmp_path / "here", quick, samples, device="cpu")
    if what.startswith("the error"):
        failing = SimpleNamespace(
            weight_error=out_of_memory(1, metrics.weight_error), output_error=metrics.output_error
        )
        monkeypatch.setattr(fitting, "metrics", failing)
    else:
        monkeypatch.setattr(calibrated, "layer_from_tensors", out_of_memory(1, calibrated.layer_from_tensors))
    with Elsewhere():
        llava_fa.compress(checkpoint, tmp_path / "there", quick, samples, device=DEVICE)
    assert devices.at_a_time(2, DEVICE) == 64
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_a_gpu_without_a_number_is_the_one_that_its_tensors_are_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    plain, same, other = torch.device("cuda"), torch.device("cuda", 1), torch.device("cuda", 0)
    full = devices.at_a_time(1, same)
    assert devices.halving(out_of_memory(1, lambda: devices.at_a_time(1, same)), plain) == full // 2
    assert devices.halving(out_of_memory(1, lambda: devices.at_a_time(1, plain)), same) == full // 4
    assert len(devices.slices(full, 1, same)) == 4
    assert devices.at_a_time(1, other) == full


def test_reading_and_writing_are_done_beside(checkpoint, quick, tmp_path, monkeypatch):
    done, read, save = [], PlannedLayer.read, WorkFolder.save

    def noted(what, name):
        done.append((what, name, threading.current_thread() is threading.main_thread()))

    def reads(self):
        noted("read", self.name)
        return read(self)

    def saves(self, name, *args):
        noted("written", name)
        save(self, name, *args)

    monkeypatch.setattr(PlannedLayer, "read", reads)
    monkeypatch.setattr(WorkFolder, "save", saves)
    fitted = []
    with Elsewhere():
        llava_fa.compress(
            checkpoint, tmp_path / "out", quick, device=DEVICE, progress=lambda now: fitted.append(now.name)
        )
    names = [name for name in dict.fromkeys(fitted) if name]
    assert [name for what, name, _ in done if what == "written"] == names
    assert sorted(name for what, name, _ in done if what == "read") == sorted(names)
    assert [name for what, name, where in done if what == "read" and where] == names[:1]
    assert not any(where for what, _, where in done if what == "written")
    for i, (what, name, _) in enumerate(done):
        if what == "read":  # two at most wait to be written or fitted
            written = sum(one == "written" for one, *_ in done[:i])
            assert names.index(name) - written <= 3


def test_layers_of_several_inputs_are_written_while_the_next_is_fitted(checkpoint, quick, tmp_path, monkeypatch):
    source = open_source(checkpoint)
    plan = make_plan(empty_model(source.home, len(source.entries)), source, quick)
    stage, begun, beside, save = plan.layers[:3], threading.Event(), [], Parts.save

    def waits(self, name, *args):
        if name == stage[0].name:
            beside.append(begun.wait(10))
        save(self, name, *args)

    def told(now):
        if now.name == stage[1].name:
            begun.set()

    monkeypatch.setattr(Parts, "save", waits)
    (tmp_path / "parts").mkdir()
    with Elsewhere():
        job = streaming.Job(plan, Parts(tmp_path / "parts"), told, DEVICE)
        Alone(job, {}).fit("stage", [[layer] for layer in stage], lambda _: None, lambda layer, _: job.compress(layer))
        job.overlap.close()
    assert beside == [True]
    assert not job.missing(stage)


def test_what_cannot_be_written_is_told_and_the_rest_is_there(checkpoint, quick, tmp_path, digest, monkeypatch):
    save, written = WorkFolder.save, []

    def full(self, name, *args):
        if len(written) == 5:
            raise FourierError("the disk is full", remedy="Free some space")
        written.append(name)
        save(self, name, *args)

    with monkeypatch.context() as patch, Elsewhere():
        patch.setattr(WorkFolder, "save", full)
        with pytest.raises(FourierError, match="the disk is full"):
            llava_fa.compress(checkpoint, tmp_path / "out", quick, device=DEVICE)
    parts = tmp_path / "out.partial" / "parts"
    assert sorted(path.name for path in parts.iterdir()) == sorted(f"{name}.safetensors" for name in written)
    report = llava_fa.compress(checkpoint, tmp_path / "out", quick, device="cpu")
    llava_fa.compress(checkpoint, tmp_path / "whole", quick, device="cpu")
    assert len(report.layers) > 5
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_weight_that_cannot_be_read_is_told_of_its_own_layer(checkpoint, quick, tmp_path, monkeypatch):
    read, bad = PlannedLayer.read, []

    def broken(self):
        bad.append(self.name)
        if len(bad) == 4:
            raise FourierError("the file ends early", remedy="Get it again")
        return read(self)

    monkeypatch.setattr(PlannedLayer, "read", broken)
    with Elsewhere(), pytest.raises(FourierError) as caught:
        llava_fa.compress(checkpoint, tmp_path / "out", quick, device=DEVICE)
    assert str(caught.value).startswith(bad[3])


def test_a_quarter_of_a_gpu_is_left(monkeypatch):
    used = {"mem_get_info": (50, 120), "memory_reserved": 40, "memory_allocated": 30}
    for name, value in used.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert devices.spare(torch.device("cuda", 0)) == 50 + 10 - 30
    assert devices.spare(torch.device("cpu")) > 1 << 60


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    from llava_fa.hub.loading import check_device

    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert check_device("auto") == torch.device(kind)
