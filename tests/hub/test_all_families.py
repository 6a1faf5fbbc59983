"""Every family that transformers has: small, through everything (benchmarks/families.py); a dozen by default."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import families
from likeness import output_errors, unlike
from made_up import words

DOZEN = (
    *("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"),
    *("paligemma", "smolvlm", "mistral3", "glm4v", "molmo2", "qwen3_5"),
)
CANNOT = {
    "fast_vlm": "timm",
    "gemma3n": "timm",
    "perception_lm": "timm",
    "inkling_mm_model": "scipy",
}
"""Family → the package that transformers wants for it, and that need not be there."""

NOT_YET = ("shieldgemma2",)
"""Families that do not come through; docs/models.md says where each fails. One that does must leave this list."""


def _marked(family):
    if family in DOZEN:
        return family
    more = [pytest.mark.xfail(strict=True)] if family in NOT_YET else []
    return pytest.param(family, marks=[pytest.mark.slow, *more])


@pytest.mark.parametrize("family", [_marked(family) for family in families.mapping()])
def test_a_family_comes_through(family, tmp_path, exact_activations):
    if family in CANNOT and importlib.util.find_spec(CANNOT[family]) is None:
        with pytest.raises(ImportError, match=CANNOT[family]):
            families.check(family, tmp_path)
        return
    row = families.check(family, tmp_path)
    assert row["layers"] > 0
    assert row["logits"] <= families.TOLERANCE
    assert row["picture"] or family not in DOZEN
    assert row["calibrated"] is None or row["calibrated"] > 0


def test_what_is_lost_or_changed_is_found(tmp_path, exact_activations):
    """The comparison that all of it rests on."""
    families.check("llava", tmp_path)
    original, packed, decoded = (families.load(tmp_path / name) for name in ("in", "free", "free"))
    decoded.dequantize()
    assert all(0 < error < families.WORST_ERROR for error in unlike(original, packed, decoded).values())
    name = "model.vision_tower.encoder.layers.0.layer_norm1.bias"
    for model in (packed, decoded):
        model.get_parameter(name).data += 1e-3
    with pytest.raises(families.Broken, match="is not packed, and has changed"):
        unlike(original, packed, decoded)
    mistaken = "model.language_model.layers.0.mlp.up_proj.weight"
    decoded.get_parameter(mistaken).data.normal_()
    original.get_parameter(name).data += 1e-3
    errors = unlike(original, packed, decoded)
    assert [key for key, error in errors.items() if not error < families.WORST_ERROR] == [mistaken]


def test_a_mistaken_layer_is_told_from_those_behind_it(tmp_path, exact_activations):
    """Outputs are far from the original's from there on, and only the layer itself is to blame."""
    families.check("qwen3_vl_moe", tmp_path)
    original, decoded = (families.load(tmp_path / name) for name in ("in", "data"))
    decoded.dequantize()
    inputs = [words(original)]
    text = [key for key in output_errors(original, decoded, inputs) if "language_model" in key]
    mistaken = "model.language_model.layers.0.self_attn.v_proj.weight"
    weight = decoded.get_parameter(mistaken)
    weight.data = weight.data.roll(1, 1)  # by one input
    errors = output_errors(original, decoded, inputs)
    assert len(text) > 10
    assert [key for key in text if not errors[key] < families.WORST_ERROR] == [mistaken]
    decoded.model.language_model.layers[1].mlp.experts.down[2].weight.data.neg_()
    reached = output_errors(original, decoded, [words(original, seed, 40) for seed in range(3)])
    assert reached["model.language_model.layers.1.mlp.experts.down_proj"] > 1
