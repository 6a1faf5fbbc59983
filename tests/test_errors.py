import pytest

from llava_fa.errors import FourierError, explained, located


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
