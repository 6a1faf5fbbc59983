"""Mutated requests as vLLM is to be given them: read or refused, and what is read is JSON of known fields."""

import collections
import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("openai", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")

import helpers
from test_request_fuzz import WITH_TOOLS, Mutator, dumped, valid

from llava_fa.serve import fields
from llava_fa.serve.errors import ApiError
from llava_fa.serve.limits import Limits
from llava_fa.serve.pictures import Sources
from llava_fa.serve.requests import read_chat
from llava_fa.serve.vllm_engine import finisher

MORE = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "presence_penalty": 0.5,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True},
    },
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "parallel_tool_calls": False,
    "stream_options": {"include_usage": True},
    "mm_processor_kwargs": {"visual_tokens": 4},
    "seed": 3,
}
PASSED = {
    "model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "tools",
    "frequency_penalty", "logit_bias", *MORE,
}  # fmt: skip


LIMITS = Limits(body_bytes=2**20, pixels=10**6)


def outcome(data, understood):
    """The request that is read of these bytes, or the error."""
    try:
        return read_chat(data, "tiny", 258, LIMITS, Sources(), understood)
    except ApiError as error:
        return error


@pytest.mark.parametrize(("seed", "count"), [(1, 1500), pytest.param(2, 40_000, marks=pytest.mark.slow)])
def test_mutated_requests_are_read_or_refused(seed, count):
    processor = helpers.processor()
    processor.chat_template = WITH_TOOLS
    understood = fields.vllm(finisher(processor, 40, greedy=True), (16, 4, 1))
    mutator, outcomes = Mutator(seed), collections.Counter()
    assert not [body for body in valid() if isinstance(outcome(dumped({**body, **MORE}), understood), ApiError)]
    for _ in range(count):
        body = json.loads(json.dumps({**mutator.rng.choice(valid()), **MORE}))
        for _ in range(mutator.rng.choice([0, 1, 1, 2, 4])):
            body = mutator.tree(body)
        data = dumped(body)
        found = outcome(data, understood)
        if isinstance(found, ApiError):
            assert found.status in (400, 404, 413), data
            json.dumps(found.body()).encode()
            outcomes[found.code] += 1
        else:
            assert set(found.body) <= PASSED, data
            json.dumps(found.body, allow_nan=False).encode()
            outcomes["read"] += 1
    print(dict(outcomes.most_common()))
    assert outcomes["read"] > count / 10
    assert len(outcomes) >= 6
