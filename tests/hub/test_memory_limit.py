"""A calibrated run within the memory that it said it takes, where the whole model would not have had the room."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import helpers
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import llava_fa
from llava_fa.hub import shares

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit is Linux's")]

ROOM = 680 << 20
SPARE = 256 << 20
"""What the kernel counts as data and is not memory in use: stacks, pages that nobody has written."""
CHILD = """
    import json, resource, sys
    import torch, transformers
    import llava_fa
    from llava_fa import FourierConfig
    from llava_fa.hub import memory, shares

    folder, out, room, bits, share = sys.argv[1:]
    shares.SHARE = int(share)
    torch.set_num_threads(2)
    torch.randn(600, 600).bfloat16() @ torch.randn(600, 600).bfloat16()  # what the libraries take for themselves
    status = lambda key: next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key + ":"))
    known = {"base": status("VmRSS"), "data": status("VmData")}
    resource.setrlimit(resource.RLIMIT_DATA, (known["data"] + int(room) + SPARE,) * 2)
    told = []
    question = "what is " + "so often said of it " * 25
    row = [{"role": "user", "content": question}, {"role": "assistant", "content": "that"}]
    config = FourierConfig(bits=float(bits), refine_passes=0, only=("model.layers.11.mlp.down_proj",))
    memory.psutil.virtual_memory = lambda: (_ for _ in ()).throw(AssertionError("it was told"))
    try:
        may = known["base"] + int(room)
        llava_fa.compress(folder, out, config, [row] * 4, memory=may, on_plan=lambda p: told.append(p.memory))
    except (MemoryError, RuntimeError, llava_fa.FourierError) as error:
        known["error"] = str(error)
    print(json.dumps({**known, "told": told, "peak": status("VmHWM")}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """170 million weights in bf16, 340 MB."""
    place = helpers.save_text_model(tmp_path_factory.mktemp("model") / "large")
    config = Qwen2Config(vocab_size=300, hidden_size=1024, intermediate_size=3584, num_hidden_layers=12,
                         num_attention_heads=8, num_key_value_heads=4, bos_token_id=0, eos_token_id=0,
                         pad_token_id=0, max_position_embeddings=4096)  # fmt: skip
    (place / "model.safetensors").unlink()
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(place, max_shard_size="100MB")
    return place


def run(folder: Path, out: Path, room: int, bits: float = 4, share: int = shares.SHARE) -> dict:
    """The child's figures, with so many bytes above what it had at the start; shares have so many tokens."""
    child = textwrap.dedent(CHILD).replace("SPARE", str(SPARE))
    program = [sys.executable, "-c", child, str(folder), str(out), str(room), str(bits), str(share)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_keeps_to_what_it_may_take(folder, tmp_path):
    tight = run(folder, tmp_path / "tight", ROOM)
    assert "error" not in tight, tight
    assert "block by block" in tight["told"][1], tight
    assert tight["peak"] <= tight["base"] + (ROOM)
    free = run(folder, tmp_path / "free", 8 << 30)
    assert "the whole model in it" in free["told"][1]
    assert free["peak"] > tight["peak"] + (100 << 20)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "tight" / name).read_bytes() == (tmp_path / "free" / name).read_bytes()


def test_so_does_one_whose_samples_are_in_several_shares(folder, tmp_path):
    room = ROOM + (90 << 20)
    found = run(folder, tmp_path / "out", room, share=300)
    assert "error" not in found, found
    assert "block by block" in found["told"][1], found
    assert found["peak"] <= found["base"] + room


def test_what_it_cannot_keep_to_is_refused(folder, tmp_path):
    refused = run(folder, tmp_path / "out", 100 << 20)
    assert "are allowed" in refused["error"]
    assert not (tmp_path / "out").exists()
    assert llava_fa.__name__
