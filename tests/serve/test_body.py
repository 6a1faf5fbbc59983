"""JSON that nothing after it stumbles over."""

import json

import pytest

from llava_fa.serve.body import DEPTH, read_json
from llava_fa.serve.errors import ApiError


def refused(data, param=None):
    with pytest.raises(ApiError) as caught:
        read_json(data, param)
    assert caught.value.status == 400
    json.dumps(caught.value.body(), ensure_ascii=False).encode()  # as it is sent
    return caught.value.code, caught.value.param, caught.value.message


@pytest.mark.parametrize(
    "value", [{}, [], "", "\U0001f600 é", 0, -1, 0.5, 2**64, -(2**63), True, None, {"a": [{"b": 1e300}]}, [[]] * 1000]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_is_sound_is_read(value, encoding):
    assert read_json(json.dumps(value, ensure_ascii=False).encode(encoding)) == value


@pytest.mark.parametrize(
    "data", [b"", b"{", b"nul", b"\xff", b'{"a": 1,}', b"{} {}", b"[" * 10**6, b'{"a":' * 10**6, b"01", b"+1"]
)
def test_what_is_no_json_is_refused(data):
    assert refused(data) == ("invalid_json", None, "The body is not JSON")
    assert refused(data, "arguments") == ("invalid_json", "arguments", "arguments is not JSON")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999", "9" * 21, "-" + "9" * 5000])
def test_numbers_beyond_use_are_refused_with_their_place(number):
    message = "a.b[1] is not a finite number of 64 bits"
    assert refused(f'{{"a": {{"b": [0, {number}]}}}}') == ("invalid_value", "a.b[1]", message)
    assert refused(number) == ("invalid_value", None, "The body is not a finite number of 64 bits")
    assert refused(number, "x")[1] == "x"


def test_half_a_surrogate_pair_is_no_character_and_a_whole_one_is():
    assert read_json(r'"\ud83d\ude00"') == "\U0001f600"
    for data in (r'{"a": ["\ud83d"]}', r'{"a": ["x\ude00\ud83d"]}', b'{"a": ["\xed\xa0\x80"]}'):
        assert refused(data)[:2] == ("invalid_value", "a[0]")
    assert refused(r'{"\ud83d": 1}')[:2] == ("invalid_value", r"\ud83d")


def test_a_key_that_comes_twice_is_refused():
    assert refused('{"x": {"a": 1, "b": 2, "a": 1}}') == ("invalid_json", None, "The body has the key 'a' twice")


def test_depth_is_limited():
    def nested(levels):
        return "[" * levels + "]" * levels

    assert read_json(nested(DEPTH))
    code, param, message = refused(nested(DEPTH + 1))
    assert (code, param) == ("invalid_value", "[0]" * 6)
    assert message.endswith(f"is deeper than {DEPTH} levels")
