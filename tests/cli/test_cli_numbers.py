"""Every number of every command: out of bounds, or no number at all, is wrong usage; nothing is loaded or written.

The options are found by going through the commands, so that a new one is tested without being named here.
"""

import inspect
import math
import os
import typing

import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

from llava_fa.cli.main import app

GONE = "./no-such-model"
NEEDED = {
    "explain": ["--question", "what?", "--image", "p.png"],
    "chat": ["--image", "p.png"],
    "train": ["--data", "world"],
    "eval": ["--limit", "9"],  # these are drawn before the model is looked for
}
EXTREMES = [
    "nan", "NaN", "inf", "-inf", "Infinity", "1e400", "-1e400", "", " ", "-", "x", "1" + "0" * 30, "-1" + "0" * 30,
    "1" + "0" * 400, "9" * 5000, "1e30", "1e-400", "-0", "-0.0", "-1", "-1.5", "0x10", "²", "1,5",
]  # fmt: skip
SIZES = ["1e400GB", "nanGB", "inf", "-1GB", "0", "0GB", "9" * 400 + "GB", "9" * 30, "GB", "1 XB", "1.1.1GB", "²GB"]


def commands(group=app, path=()):
    for made in group.registered_commands:
        function = inspect.unwrap(made.callback)
        yield (*path, made.name or function.__name__), function
    for sub in group.registered_groups:
        yield from commands(sub.typer_instance, (*path, sub.name))


def numbers():
    """(command, arguments it needs, option, kind, its `OptionInfo`) of every option that is, or holds, a number."""
    for path, function in commands():
        hints = typing.get_type_hints(function, include_extras=True)
        needed = list(NEEDED.get(" ".join(path), []))
        for parameter in inspect.signature(function).parameters.values():
            info = next((one for one in getattr(hints[parameter.name], "__metadata__", ()) if one is not None), None)
            if info is None or isinstance(info, OptionInfo):
                continue
            needed.append("what?" if parameter.name == "question" else "new" if parameter.name == "out" else GONE)
        for name, hint in hints.items():
            info = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, OptionInfo)), None)
            kinds = {hint.__origin__, *typing.get_args(hint.__origin__)} if info else set()
            kind = next((one for one in (int, float) if one in kinds), None)
            if info and (kind or info.parser):
                option = next((one for one in info.param_decls or () if one), f"--{name.replace('_', '-')}")
                yield path, needed, option, kind, info


NUMBERS = list(numbers())


def names(case):
    return " ".join((*case[0], case[2]))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Image.new("RGB", (8, 8)).save("p.png")
    yield tmp_path
    assert os.listdir() == ["p.png"]


def allowed(text, kind, info):
    """Whether the option's own bounds allow it: the rule that this file holds commands to.

    A float that is whole is an integer to some versions of typer, and none to others.
    """
    try:
        value = int(text) if kind is int else float(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            return False
    return info.min <= value <= info.max and (kind is float or value == int(value))


def test_all_numbers_are_found_and_have_bounds_on_both_sides():
    found = {names(case) for case in NUMBERS}
    assert len(NUMBERS) > 55
    assert found >= {"compress --bits", "compress --size", "eval --visual-tokens", "world train --workers"}
    assert {path[0] for path, *_ in NUMBERS} == {path[0] for path, _ in commands()} - {"doctor"}
    for case in NUMBERS:
        _, _, _, kind, info = case
        if kind:
            assert info.min is not None, names(case)
            assert info.max is not None, names(case)
            assert math.isfinite(info.max), names(case)


def says(result, option):
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    assert option in result.output


@pytest.mark.parametrize("case", NUMBERS, ids=names)
def test_what_no_bound_allows_is_wrong_usage(case):
    path, needed, option, kind, info = case
    for text in EXTREMES if kind else [*EXTREMES, *SIZES]:
        if kind and allowed(text, kind, info):
            continue  # the next test's
        result = CliRunner().invoke(app, [*path, *needed, option, text])
        assert result.exit_code == 2, (text[:50], result.output)
        says(result, option)


BOUND_BY_A_MODEL = [case for case in NUMBERS if case[3] and GONE in case[1]]


@pytest.mark.parametrize("case", BOUND_BY_A_MODEL, ids=names)
def test_what_the_bounds_allow_ends_where_the_model_is_missing(case):
    """Never in a traceback, for the smallest, the largest and minus zero, nor without a word."""
    path, needed, option, kind, info = case
    for text in {str(kind(info.min)), str(kind(info.max)), *(text for text in EXTREMES if allowed(text, kind, info))}:
        result = CliRunner().invoke(app, [*path, *needed, option, text])
        assert result.exit_code in (1, 2), (text, result.output)
        assert isinstance(result.exception, SystemExit), result.exc_info
        assert "error" in result.output.lower()


@pytest.mark.parametrize("value", ["", "x", "0", "-1", "1.5", "nan", "9" * 30, "9" * 5000])
def test_the_number_of_processes_in_the_environment_is_checked(value, monkeypatch, folder):
    monkeypatch.setenv("WORLD_SIZE", value)
    result = CliRunner().invoke(app, ["train", GONE, "new", "--data", "world"])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "WORLD_SIZE is" in result.output


def test_more_of_the_world_than_memory_holds_is_not_drawn():
    for line in (
        ["eval", GONE, "--limit", "100001"],
        ["eval", GONE, "--task", "world-video", "--limit", "10001"],
        ["compress", GONE, "new", "--calibration", "world", "--samples", "100001"],
    ):
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 2, result.output
        assert "are drawn of" in result.output
