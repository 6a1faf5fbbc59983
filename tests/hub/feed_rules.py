"""An oracle for `hub.feeds`: block layouts of transformers' LLaVA-like families by name, as once written down by hand.

(norm, linear layers that it feeds, modules none of which may be in the block: layouts with norms *after* the attention
or the MLP reuse the names of those before it).
"""

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.fc1")
_AFTER = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
RULES = (
    ("input_layernorm", _QKV, ()),
    ("post_attention_layernorm", _GATE_UP, _AFTER),
    ("pre_feedforward_layernorm", _GATE_UP, ()),
    ("layer_norm1", _QKV, ()),
    ("layer_norm2", ("mlp.fc1",), ()),
    ("norm1", ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj"), ()),
    ("norm2", ("mlp.fc1", "mlp.linear_fc1", "mlp.gate_proj", "mlp.up_proj"), ()),
    ("attention_norm", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), ()),
    ("ffn_norm", ("feed_forward.gate_proj", "feed_forward.up_proj"), ()),
    ("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), ()),
    ("layernorm_after", ("mlp.fc1",), ()),
    ("ln_q", ("mlp.0",), ()),
    ("layer_norm", ("linear_1",), ()),
)


def norm_by_name(names, linear):
    """The norm that the rules say feeds ``linear``, in a model with modules ``names``; None where no rule says so."""
    for norm, suffixes, unless in RULES:
        for suffix in suffixes:
            if linear.endswith("." + suffix):
                block = linear.removesuffix(suffix)
                if block + norm in names and not any(block + other in names for other in unless):
                    return block + norm
    return None
