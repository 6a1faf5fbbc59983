"""A compression over a cluster of Ray ends with the bytes of one without, whoever dies meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time

import helpers
import pytest
import torch
import transformers

import llava_fa
from llava_fa import FourierError
from llava_fa.hub import proofread, shares
from llava_fa.hub.compress import carry_out
from llava_fa.hub.request import CompressionRequest
from llava_fa.world.samples import calibration_samples

pytest.importorskip("ray")
from llava_fa.cluster.crew import crew

QUICK = llava_fa.FourierConfig(bits=2, refine_passes=0)
LAYERS = 28


def said(number):
    """A sample without a picture."""
    return [
        {"role": "user", "content": f"what was said {number} times? " + "so it goes " * number},
        {"role": "assistant", "content": "that"},
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random LLaVA folder in bf16."""
    return helpers.save_llava(tmp_path_factory.mktemp("model") / "llava", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Layers that take some tenths of a second each."""
    place = helpers.save_text_model(tmp_path_factory.mktemp("model") / "large")
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def samples():
    """Pictures, and at the end texts alone: the last shares never come to the vision tower."""
    pictures = [(helpers.picture(seed), f"what is {seed}?", "a picture") for seed in range(5)]
    return [*pictures, *(said(number) for number in range(4))]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Nobody waits long for room that does not come."""
    monkeypatch.setattr("llava_fa.cluster.crew._GRACE", 4.0)


@pytest.fixture
def split(monkeypatch):
    """A sample or two are a share."""
    monkeypatch.setattr(shares, "SHARE", 60)


def made(model, out, calibration=None, address=None, **more):
    """The folder that comes of it."""
    request = CompressionRequest(model=model, config=QUICK, calibration=calibration)
    if address is None:
        carry_out(request, out, **more)
        return out
    with crew(address) as workers:
        carry_out(request, out, crew=workers, **more)
    return out


@pytest.fixture
def alone(checkpoint, samples, split, tmp_path):
    """The folder of a calibrated run without Ray."""
    return made(checkpoint, tmp_path / "alone", samples)


@pytest.mark.parametrize("cpus", [(1,), (1, 1), (7,)])
def test_without_data(nodes, checkpoint, tmp_path, digest, cpus):
    nodes.have(*cpus)
    told = []
    out = made(checkpoint, tmp_path / "ray", address=nodes.address, progress=told.append)
    assert digest(out) == digest(made(checkpoint, tmp_path / "alone"))
    assert len({one.worker for one in told if one.worker}) >= min(2, sum(cpus))  # the last may find nothing left
    assert [one.done for one in told if one.stage == "done"] == [LAYERS]
    assert sorted(os.listdir(tmp_path)) == ["alone", "ray"]


@pytest.mark.parametrize("cpus", [(1,), (1, 1), (7,)])
def test_with_data(nodes, checkpoint, samples, alone, tmp_path, digest, cpus):
    nodes.have(*cpus)
    assert digest(made(checkpoint, tmp_path / "ray", samples, nodes.address)) == digest(alone)


def test_the_shares_are_several(checkpoint, samples, tmp_path, digest, monkeypatch):
    """Or these tests would show nothing: added share by share, some sum has other bits."""
    one = made(checkpoint, tmp_path / "one", samples)
    monkeypatch.setattr(shares, "SHARE", 60)
    assert digest(one) != digest(made(checkpoint, tmp_path / "several", samples))


def test_a_mixture_of_experts(nodes, split, tmp_path, digest):
    """Experts that no token of any share comes to, and those of one share alone."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=16, num_experts_per_tok=1,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = helpers.save_text_model(tmp_path / "mixture")
    torch.manual_seed(0)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(folder)
    told = [said(number) for number in range(6)]
    alone = made(folder, tmp_path / "alone", told)
    nodes.have(1, 1)
    assert digest(made(folder, tmp_path / "ray", told, nodes.address)) == digest(alone)


@pytest.mark.parametrize("killed", [False, True])
def test_broken_answers_are_mended(nodes, tmp_path, digest, monkeypatch, killed):
    """By all workers, as by one process; also where one of them dies at it."""
    monkeypatch.setattr(shares, "SHARE", 150)
    monkeypatch.setattr(proofread, "BROKEN", 0.5)
    module = "model.language_model.layers.0.self_attn"
    config = llava_fa.FourierConfig(bits=1, refine_passes=0, only=(f"{module}.[qk]_proj", f"{module}.o_proj"))
    request = CompressionRequest(model="tiny", config=config, calibration=calibration_samples(10, 0))
    report = carry_out(request, tmp_path / "alone")
    assert any("drawn anew" in note for layer in report.layers for note in layer.notes)
    nodes.have(1, 1)
    reading = Killer(0, nodes.kill if killed else None, stage="proofreading")
    with crew(nodes.address) as workers:
        carry_out(request, tmp_path / "ray", crew=workers, progress=reading)
    assert reading.act is None
    assert digest(tmp_path / "ray") == digest(tmp_path / "alone")


class Killer:
    """A progress callback that does something once, when workers have done so many layers, or a stage has come."""

    def __init__(self, at, act, stage=""):
        self.at, self.act, self.stage, self.seen = at, act, stage, []

    def __call__(self, progress):
        self.seen.append(progress)
        if (
            self.act is not None
            and progress.done >= self.at
            and self.stage in (progress.stage, "" if progress.worker else None)
        ):
            act, self.act = self.act, None
            act()


@pytest.mark.parametrize("at", [2, 15])
def test_a_node_is_killed(nodes, checkpoint, samples, alone, tmp_path, digest, at):
    """The one left has room for one worker, which begins anew with the shares of both."""
    nodes.have(1, 1)
    killer = Killer(at, nodes.kill)
    out = made(checkpoint, tmp_path / "ray", samples, nodes.address, progress=killer)
    assert killer.act is None
    assert any("died" in one.name for one in killer.seen)
    assert digest(out) == digest(alone)


def test_a_node_is_killed_without_data(nodes, large, tmp_path, digest):
    """Its worker stops before, so that it has a layer in hand that nobody else has."""
    nodes.have(1, 1)
    stopper, killer = Killer(3, nodes.stop), Killer(7, nodes.kill)

    def progress(one):
        stopper(one)
        killer(one)

    out = made(large, tmp_path / "ray", address=nodes.address, progress=progress)
    assert stopper.act is None
    assert killer.act is None
    assert any("died" in one.name for one in killer.seen)
    assert digest(out) == digest(made(large, tmp_path / "alone"))


def test_a_node_is_killed_and_another_comes(nodes, checkpoint, samples, alone, tmp_path, digest):
    nodes.have(1, 1)

    def exchange():
        nodes.kill()
        nodes.nodes.append(nodes.cluster.add_node(num_cpus=1))

    killer = Killer(8, exchange)
    out = made(checkpoint, tmp_path / "ray", samples, nodes.address, progress=killer)
    assert digest(out) == digest(alone)
    assert len({one.worker for one in killer.seen if one.worker}) == 3


def test_the_command_is_killed_and_resumes(nodes, checkpoint, tmp_path, digest):
    """The head's death: all workers end with it, and the same command goes on."""
    nodes.have(1, 1)
    out, expected = tmp_path / "ray", made(checkpoint, tmp_path / "alone")
    line = [sys.executable, "-m", "llava_fa.cli.main", "compress", str(checkpoint), str(out), "--bits", "2"]
    parts = out.with_name("ray.partial") / "parts"
    running = subprocess.Popen([*line, "--ray", nodes.address], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = len(list(parts.glob("*.safetensors")))
    assert 3 <= done < LAYERS
    again = subprocess.run([*line, "--ray", nodes.address], capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    plain = tmp_path / "plain"
    subprocess.run([*line[:5], str(plain), *line[6:]], check=True, capture_output=True, timeout=200)
    assert digest(out) == digest(plain)
    assert expected.is_dir()


def test_the_command_is_killed_and_resumes_with_data(nodes, checkpoint, tmp_path, digest):
    """What workers held of hidden states is gone with them, and made again from the layers that are finished."""
    nodes.have(1, 1)
    rows = tmp_path / "rows.json"
    rows.write_text(
        json.dumps([{"question": "what was said? " + "so it goes " * n, "answer": "that"} for n in range(5)])
    )

    def line(out):
        module = [sys.executable, "-m", "llava_fa.cli.main", "compress", str(checkpoint), str(out)]
        return [*module, "--bits", "2", "--calibration", str(rows), "--samples", "5"]

    out, parts = tmp_path / "ray", tmp_path / "ray.partial" / "parts"
    ray = [*line(out), "--ray", nodes.address]
    running = subprocess.Popen(ray, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.safetensors"))) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert 9 <= len(list(parts.glob("*.safetensors"))) < LAYERS
    again = subprocess.run(ray, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    subprocess.run(line(tmp_path / "plain"), check=True, capture_output=True, timeout=300)
    assert digest(out) == digest(tmp_path / "plain")


def test_what_nobody_answers(tmp_path):
    with pytest.raises(FourierError, match="no cluster of Ray answers there"), crew("127.0.0.1:9"):
        pass
    with pytest.raises(FourierError, match="Ray's client is not supported"), crew("ray://127.0.0.1:10001"):
        pass


def test_other_versions_are_refused(nodes, monkeypatch):
    nodes.have(1)
    monkeypatch.setattr("llava_fa.cluster.connect.version", lambda name: "0.0.1")
    with pytest.raises(FourierError, match=r"it has llava-fa .*, and this machine has 0\.0\.1"), crew(nodes.address):
        pass


def test_no_room_is_said(nodes, checkpoint, tmp_path):
    nodes.have(1)
    request = CompressionRequest(model=checkpoint, config=QUICK)
    with (
        pytest.raises(FourierError, match="no node of the cluster has room for a worker, which takes 1 CPU, 1 GPU"),
        crew(nodes.address, gpus=1.0) as workers,
    ):
        carry_out(request, tmp_path / "out", crew=workers)


def test_a_node_with_another_checkpoint(nodes, checkpoint, tmp_path, monkeypatch):
    """As if its files were others: the driver is told another fingerprint."""
    from llava_fa.cluster import crew as module

    nodes.have(1)
    true = module.open_source
    monkeypatch.setattr(
        module, "open_source", lambda folder: type("Other", (), {"fingerprint": "0" + true(folder).fingerprint})
    )
    with pytest.raises(FourierError, match=r"worker 1 on .*: the node has another checkpoint in"):
        made(checkpoint, tmp_path / "out", address=nodes.address)
