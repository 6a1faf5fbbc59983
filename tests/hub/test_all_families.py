"""Every family that transformers has: small, through everything (benchmarks/families.py); a dozen by default."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import families

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
"""Family → the package that transformers wants for it, and we do not have."""

NOT_YET = (
    *("diffusion_gemma", "dots3_note", "evolla", "nemotron_h_omni", "pi0", "pp_formulanet", "qwen3_5_moe"),
    *("shieldgemma2", "step3p7", "kyutai_speech_to_text", "nemo_speechlm", "qwen2_5_omni"),
    *("qwen3_omni_moe", "voxtral_realtime"),
)
"""Families that do not come through; docs/models.md says where each fails. One that does must leave this list."""


def _marked(family):
    if family in DOZEN:
        return family
    more = [pytest.mark.xfail(strict=True)] if family in NOT_YET else []
    return pytest.param(family, marks=[pytest.mark.slow, *more])


@pytest.mark.parametrize("family", [_marked(family) for family in families.mapping()])
def test_a_family_comes_through(family, tmp_path, exact_activations):
    if family in CANNOT:
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
    assert 0 < families._parameters(original, packed, decoded) < families.WORST_ERROR
    name = "model.vision_tower.encoder.layers.0.layer_norm1.bias"
    for model in (packed, decoded):
        model.get_parameter(name).data += 1e-3
    with pytest.raises(families.Broken, match="is not packed, and has changed"):
        families._parameters(original, packed, decoded)
    weight = decoded.model.language_model.layers[0].mlp.up_proj.weight
    weight.data = torch.randn_like(weight)
    original.get_parameter(name).data += 1e-3
    with pytest.raises(families.Broken, match="with an error"):
        families._parameters(original, packed, decoded)
