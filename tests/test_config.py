import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fa import Budget, Casp, CompressionRequest, FourierConfig, FourierError
from llava_fa.config import format_size


def test_defaults():
    config = FourierConfig()
    assert (config.method, config.bits, config.code_bits, config.factor_dtype) == ("best", 4.0, 8, "int8")
    assert config.quant_method == "llava_fa"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 2


@settings(deadline=None)
@given(
    bits=st.sampled_from([1, 1.5, 2, 2.5, 3, 3.5, 4]),
    method=st.sampled_from(["best", "paper"]),
    rank=st.integers(0, 999),
    seed=st.integers(-9, 9),
    skip=st.lists(st.text(max_size=5), max_size=3),
    calibration=st.sampled_from(["auto", "none", "diagonal"]),
)
def test_json_round_trip(**fields):
    config = FourierConfig(**fields)
    assert FourierConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["quant_method"] == "llava_fa"
    assert config.replace() == config


@pytest.mark.parametrize("codes", ["rings", "trellis", "auto"])
def test_codes_round_trip_and_rings_are_written_as_ever(codes):
    config = FourierConfig(bits=2, codes=codes)
    assert FourierConfig.from_json(config.to_json()) == config
    assert ("codes" in config.to_dict()) == (codes != "rings")
    assert FourierConfig.from_dict({"bits": 2}).codes == "rings"
    assert config.replace(method="paper").codes == "rings"


def test_target_is_the_methods_own_unless_given():
    assert FourierConfig().target == "outputs"
    assert FourierConfig(method="paper").target == "weights"
    weights = FourierConfig(target="weights")
    assert (FourierConfig().follows_outputs, weights.follows_outputs) == (True, False)
    assert not FourierConfig(calibration="diagonal").follows_outputs
    assert FourierConfig.from_json(weights.to_json()) == weights
    assert "target" not in FourierConfig().to_dict()
    assert FourierConfig().replace(method="paper").target == "weights"


def test_auto_gives_small_layers_rings():
    auto = FourierConfig(codes="auto")
    assert [auto.codes_for(n) for n in (16, 63, 64, 4096)] == ["rings", "rings", "trellis", "trellis"]
    assert FourierConfig(codes="trellis").codes_for(16) == "trellis"
    assert FourierConfig().codes_for(4096) == "rings"


def test_paper_shares_its_bits_and_the_phase_takes_the_odd_one():
    config = FourierConfig(method="paper", bits=2.5)
    assert (config.amplitude_bits, config.phase_bits, config.factor_dtype) == (2, 3, "bf16")
    explicit = FourierConfig(method="paper", amplitude_bits=4, phase_bits=5)
    assert (explicit.bits, explicit.code_bits) == (4.5, 9)
    assert FourierConfig.from_dict(explicit.to_dict()) == explicit
    assert explicit.replace(bits=3).amplitude_bits == 3
    assert explicit.replace(method="best", bits=4).factor_dtype == "int8"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "magic"}, "method is 'magic'. Choose one of best, paper"),
        ({"calibration": "x"}, "calibration is 'x'"),
        ({"codes": "vq"}, "codes is 'vq'. Choose one of rings, trellis, auto"),
        ({"method": "paper", "codes": "trellis"}, "codes 'trellis' belong to method 'best'"),
        ({"bits": 0.5}, "bits is 0.5. Give 1 to 4 in steps of 0.5"),
        ({"bits": 4.5}, "bits is 4.5"),
        ({"bits": 2.25}, "bits is 2.25"),
        ({"bits": -2}, "bits is -2"),
        ({"bits": float("nan")}, "bits is nan"),
        ({"bits": float("inf")}, "bits is inf"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": True}, "bits is True"),
        ({"bits": None}, "bits is None"),
        ({"method": "paper", "bits": float("nan")}, "bits is nan"),
        ({"method": "paper", "bits": 0.5}, "bits is 0.5. Give 1 to 8"),
        ({"method": "paper", "bits": 9}, "bits is 9. Give 1 to 8"),
        ({"bits": 10**400}, r"bits is 1000000000.*\.\.\.0000"),
        ({"bits": 10**5000}, "bits is a number of thousands of digits"),
        ({"method": "paper", "bits": 10**400}, "bits is 1000"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 10**30}, "rank is 1000"),
        ({"inner_rank": 10**400}, "inner_rank is 1000"),
        ({"iterations": True}, "iterations is True"),
        ({"iterations": 10**30}, "iterations is 1000"),
        ({"refine_passes": float("inf")}, "refine_passes is inf"),
        ({"seed": 2**63}, "seed is 9223"),
        ({"seed": float("nan")}, "seed is nan"),
        ({"damping": True}, "damping is True"),
        ({"damping": 10**400}, "damping is 1000"),
        ({"rank": 1.5}, "rank is 1.5. Give a whole number"),
        ({"rank": True}, "rank is True"),
        ({"iterations": 0}, "iterations is 0"),
        ({"refine_passes": -1}, "refine_passes is -1"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"damping": 0}, "damping is 0"),
        ({"damping": 1.5}, "damping is 1.5"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"damping": "x"}, "damping is 'x'"),
        ({"target": "loss"}, "target is 'loss'"),
        ({"method": "paper", "target": "outputs"}, "'paper' approximates weights"),
        ({"factor_dtype": "fp8"}, "factor_dtype is 'fp8'"),
        ({"skip": "vision_tower"}, r"skip is 'vision_tower'. Give a list"),
        ({"only": [1]}, r"only is \[1\]"),
        ({"skip": None}, "skip is None"),
        ({"amplitude_bits": 4}, "belong to method 'paper'"),
        ({"phase_bits": 4}, "belong to method 'paper'"),
        ({"method": "paper", "amplitude_bits": 4}, "come together"),
        ({"method": "paper", "amplitude_bits": 0, "phase_bits": 4}, "amplitude_bits is 0. Give 1 to 8"),
        ({"method": "paper", "amplitude_bits": 4, "phase_bits": 9}, "phase_bits is 9"),
        ({"method": "paper", "amplitude_bits": 4, "phase_bits": 2.0}, "phase_bits is 2.0"),
        ({"method": "paper", "calibration": "feedback"}, "'paper' has no error feedback"),
        ({"method": "paper", "factor_dtype": "int8"}, "'paper' keeps its complex factors in bf16"),
    ],
)
def test_invalid_values_and_combinations_give_the_reason(fields, message):
    with pytest.raises(FourierError, match=message):
        FourierConfig(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"quant_method": "gptq"}', "quant_method is 'gptq'"),
        ('{"config_version": 99}', "config_version is 99; this package reads 1"),
        ('{"bitz": 4}', "unknown config field bitz"),
        ('{"bits": NaN}', "bits is nan"),
    ],
)
def test_foreign_json_is_refused(text, message):
    with pytest.raises(FourierError, match=message):
        FourierConfig.from_json(text)


def test_error_carries_its_place():
    error = FourierError("it is broken", remedy="Mend it").at("layer 3").at("model.safetensors")
    assert str(error) == "model.safetensors: layer 3: it is broken. Mend it"
    assert (error.what, error.remedy, error.where) == (
        "it is broken",
        "Mend it",
        "model.safetensors: layer 3",
    )


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (5, 5),
        ("1.1GB", 1_100_000_000),
        ("950 mb", 950_000_000),
        ("2GiB", 2 << 30),
        (".5kB", 500),
        ("12", 12),
        ("7B", 7),
    ],
)
def test_a_budget_reads_sizes(given, size):
    assert Budget(size=given).size == size
    assert Budget(size=given).to_dict() == {"size": size}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a budget is either bits or a size"),
        ({"bits": 2, "size": 3}, "a budget is either bits or a size"),
        ({"bits": 0}, "a budget of 0 bits"),
        ({"bits": math.nan}, "a budget of nan bits"),
        ({"bits": True}, "a budget of True bits"),
        ({"bits": "2"}, "a budget of '2' bits"),
        ({"bits": 10**400}, "a budget of 1000"),
        ({"bits": 1e300}, "a budget of 1e\\+300 bits"),
        ({"bits": math.inf}, "a budget of inf bits"),
        ({"size": math.nan}, "a budget of size nan"),
        ({"size": math.inf}, "a budget of size inf"),
        ({"size": True}, "a budget of size True"),
        ({"size": 10**30}, "a budget of size 1000"),
        ({"size": "9" * 400 + "GB"}, "a budget of size '9999"),
        ({"size": "1e400GB"}, "a budget of size '1e400GB'"),
        ({"size": "nanGB"}, "a budget of size 'nanGB'"),
        ({"size": "8388608TiB"}, "a budget of size"),
        ({"size": "1.1 GX"}, "Give bytes, or text such as 950MB"),
        ({"size": "-1"}, "a budget of size '-1'"),
        ({"size": 0}, "a budget of size 0"),
        ({"size": [3]}, r"a budget of size \[3\]"),
    ],
)
def test_what_is_no_budget_is_said(arguments, message):
    with pytest.raises(FourierError, match=message):
        Budget(**arguments)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (3.4e6, "3.4 MB"), (1.25e9, "1.25 GB")])
def test_sizes(count, text):
    assert format_size(count) == text


@pytest.mark.parametrize("keep", [0, -1, 1.5, math.nan, math.inf, True, "x", None, 10**400])
def test_a_share_that_casp_cannot_keep_is_refused(keep):
    with pytest.raises(FourierError, match="keep is "):
        Casp(keep=keep)


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, math.nan, math.inf, True, "x", 10**30, pytest.param(10**5000, id="huge")]
)
def test_a_request_checks_its_own_numbers(value):
    with pytest.raises(FourierError, match="visual_tokens is "):
        CompressionRequest(model="tiny", visual_tokens=value)
    if value != 1.5:
        with pytest.raises(FourierError, match="bits is "):
            CompressionRequest(model="tiny", embeddings=value)
