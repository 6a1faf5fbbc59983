import pytest

from llava_fa.errors import FourierError, explained, located, shown


def test_what_a_library_raises_is_explained():
    with pytest.raises(FourierError) as caught, explained("it cannot be read", remedy="Copy it again", where="a.json"):
        raise KeyError("x")
    assert str(caught.value) == "a.json: it cannot be read (KeyError: 'x'). Copy it again"
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_learns_where_it_was():
    with pytest.raises(FourierError) as caught, located("model"), located("layer"):
        raise FourierError("it is not finite", remedy="Mend it", where="scale")
    assert str(caught.value) == "model: layer: scale: it is not finite. Mend it"


def test_an_explanation_and_other_kinds_pass():
    with pytest.raises(FourierError, match=r"^mine$"), explained("it cannot be read", remedy=""):
        raise FourierError("mine")
    with pytest.raises(TypeError), explained("it cannot be read", remedy="", kinds=(OSError,)):
        raise TypeError


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("short", "'short'"),
        (0, "0"),
        (None, "None"),
        (True, "True"),
        (10**70, repr(10**70)),
        pytest.param(10**5000, "a number of thousands of digits", id="huge"),
        ([10**5000], "[a number of thousands of digits]"),
        (b"\x89PNG" * 5000, "20000 bytes"),
        ({"from": "human", "value": {"bytes": b"12345"}}, "{'from': 'human', 'value': {'bytes': 5 bytes}}"),
    ],
)
def test_what_is_quoted_is_short(value, told):
    assert shown(value) == told


def test_nothing_long_is_quoted_whole():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in (
        "x" * 10**6,
        ["y" * 1000] * 10**5,
        dict.fromkeys(range(10**5), "z" * 1000),
        deep,
        10**90,
        range(10**9),
    ):
        assert len(shown(value)) <= 80
    assert len(shown(10**90)) <= 80
    assert len(shown(["y" * 100] * 100, most=30)) == 30


def test_the_words_of_libraries_are_cut():
    with pytest.raises(FourierError) as caught, explained("it fails", remedy="Mend it"):
        raise ValueError("x" * 10**5)
    assert len(str(caught.value)) < 450
    assert str(caught.value).endswith("x…). Mend it")
