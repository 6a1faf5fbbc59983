"""`generate` with a static cache: the step that makes a token is one graph, each packed layer one op of it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from llava_fa import FourierConfig, compress
from llava_fa.hub.loading import load
from llava_fa.nn.factored_linear import packed_layers

TOKENS = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static") / "small"
    compress("tiny", folder, FourierConfig(bits=4))
    model, processor = load(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many cubes are there?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    return model, processor(images=Image.new("RGB", (96, 96), (90, 120, 60)), text=prompt, return_tensors="pt")


@torch.inference_mode()
def generate(small, **options) -> torch.Tensor:
    model, inputs = small
    return model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, **options)


@torch.inference_mode()
def compiled(small, backend) -> torch.Tensor:
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True  # generate compiles by itself on GPUs only
    torch._dynamo.reset()
    small[0].__dict__.pop("_compiled_call", None)
    return generate(small, cache_implementation="static", compile_config=config)


def test_the_step_is_one_graph_without_breaks(small):
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    ours = generate(small, cache_implementation="static")
    assert torch.equal(ours, generate(small))
    counters.clear()
    assert torch.equal(compiled(small, keep), ours)
    assert not counters["graph_break"]
    assert len(graphs) == 1  # for all tokens: nothing is compiled again
    layers = [name for name, _ in packed_layers(small[0]) if "language_model" in name]
    assert len(layers) > 20
    ops = [node for node in graphs[0] if "llava_fa" in str(node)]
    assert ops == [torch.ops.llava_fa.best_linear] * len(layers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor's own, at its import
def test_inductor_answers_the_same(small):
    assert torch.equal(compiled(small, "inductor"), generate(small))
