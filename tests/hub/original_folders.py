"""Checkpoints in LLaVA's first format and InternLM-2's, written from small models of transformers' classes.

Each is the inverse of what `hub.original` reads: the model as transformers' own scripts would convert it is given, and
saved as the code that trained such models saves it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import helpers
import torch
import transformers
from safetensors.torch import save_file

ROWS = 260
"""Rows of the word embedding as it is stored: as many as the tokenizer has tokens."""
GROWN = 320
"""With <image> and <pad>, in multiples of 64."""
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


def tokenizer(extra: tuple[str, ...] = ("<unk>", "<s>", "</s>"), **special: str):
    """Bytes, and some tokens before them; 260 in all by default with three and one more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*extra, *alphabet]
    words += [f"word{i}" for i in range(ROWS - len(words))]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = special or {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def chatml():
    """A tokenizer as Qwen's: it has a token for padding."""
    return tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), pad_token="<|endoftext|>", eos_token="<|im_end|>")


@dataclasses.dataclass
class Written:
    """A checkpoint in its first format, and the same model as transformers' scripts would convert it."""

    folder: Path
    tower: Path
    converted: Path

    @property
    def model(self):
        """The converted one, loaded: transformers keeps some buffers in float32."""
        return transformers.AutoModelForImageTextToText.from_pretrained(self.converted, dtype=torch.bfloat16).eval()

    @property
    def values(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def change(self, **values) -> None:
        """Other fields in config.json; None takes one out."""
        kept = {key: value for key, value in {**self.values, **values}.items() if value is not None}
        (self.folder / "config.json").write_text(json.dumps(kept))


def text_config(language: str, *, tied: bool = False, rows: int = GROWN):
    kind = {"llama": "Llama", "internlm2": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[language]
    return getattr(transformers, f"{kind}Config")(
        vocab_size=rows,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        rope_theta=50000.0,
        rms_norm_eps=1e-5,
    )


def shaken(model, stored: int = ROWS):
    """In bf16, nothing as it began; rows of added tokens are the mean of the stored ones."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.to(torch.bfloat16)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        weight = layer.weight.data
        weight[stored:] = weight[:stored].double().mean(0).to(torch.bfloat16)
    return model.eval()


def internlm(state: dict[str, torch.Tensor], heads: int, groups: int) -> dict[str, torch.Tensor]:
    """A language model's tensors as InternLM-2 has them."""
    made = {}
    renamed = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for key, value in state.items():
        if ".self_attn.q_proj." in key:
            others = [state[key.replace("q_proj", f"{kind}_proj")] for kind in "kv"]
            rows = []
            width, each = value.shape[0] // heads, heads // groups
            for group in range(groups):
                rows.append(value[group * each * width : (group + 1) * each * width])
                rows += [other[group * width : (group + 1) * width] for other in others]
            made[key.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
        elif ".self_attn.k_proj." not in key and ".self_attn.v_proj." not in key:
            for old, new in renamed.items():
                key = key.replace(old, new)
            made[key] = value
    return made


def _save(folder: Path, state: dict[str, torch.Tensor], config: dict, tokens) -> None:
    tokens.save_pretrained(folder)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_old.py").write_text("raise RuntimeError('the code of a checkpoint is never run')")


def save_internlm(root: Path, *, bias: bool = False, tokens=None) -> Written:
    """An InternLM-2, alone."""
    config = text_config("internlm2", rows=ROWS)
    config.attention_bias = bias
    torch.manual_seed(0)
    model = shaken(transformers.LlamaForCausalLM(config))
    model.save_pretrained(root / "converted")
    values = _plain(config, {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": bias})
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_old.Model", "AutoConfig": "modeling_old.Config"}
    _save(root / "in", internlm(model.state_dict(), 4, 2), values, tokens or tokenizer())
    settings = json.loads((root / "in" / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["modeling_old.Tok", None]}}
    (root / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    (root / "converted" / "tokenizer.json").write_bytes((root / "in" / "tokenizer.json").read_bytes())
    return Written(root / "in", root / "none", root / "converted")


def _plain(text, more: dict) -> dict:
    """A language model's configuration as older versions of transformers wrote it."""
    keep = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return {
        **{key: getattr(text, key) for key in keep},
        "vocab_size": ROWS,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **more,
    }


def save_tower(folder: Path, model, siglip: bool, seed: int = 9) -> None:
    """The vision tower in its own folder, as published: both halves, and what LLaVA does not run."""
    vision = model.config.vision_config
    state = {f"vision_model.{key}": value for key, value in model.model.vision_tower.state_dict().items()}
    last = vision.num_hidden_layers - 1
    if siglip:  # a layer more than LLaVA runs
        more = {k.replace(f".{last}.", f".{last + 1}."): v + 1 for k, v in state.items() if f"layers.{last}." in k}
        state |= {**more, "vision_model.head.probe": torch.ones(1, 1, 32), "logit_scale": torch.ones(1)}
    state["text_model.final_layer_norm.weight"] = torch.ones(32)
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    kind = "siglip" if siglip else "clip"
    values = vision.to_dict() | {"num_hidden_layers": last + 1 + siglip, "model_type": f"{kind}_vision_model"}
    values.pop("vision_use_head", None)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": values}))
    if siglip:
        transformers.SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    else:
        size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        transformers.CLIPImageProcessor(**size).save_pretrained(folder)


def save_llava(
    root: Path,
    language: str = "llama",
    kind: str = "Llava",
    *,
    siglip: bool = False,
    inside: bool = False,
    tied: bool = False,
    names: str | None = None,
    rows: int = GROWN,
) -> Written:
    """A LLaVA in its first format, with a CLIP or SigLIP tower beside it or inside its weights.

    Args:
        kind: transformers' class: ``Llava``, ``LlavaNext``, ``LlavaOnevision``.
        names: the language model's names, where they are not its own.
        rows: of the word embedding once tokens are added.
    """
    vision = getattr(transformers, "SiglipVisionConfig" if siglip else "CLIPVisionConfig")
    more = {"vision_use_head": False} if siglip else {}
    features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1} if siglip else {}
    grid = {} if kind == "Llava" else {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision(num_hidden_layers=2 if siglip else 3, **_VISION, **more),
        text_config=text_config(language, tied=tied, rows=rows),
        image_token_index=ROWS,
        tie_word_embeddings=tied,
        **features,
        **grid,
    )
    torch.manual_seed(0)
    model = shaken(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    model.save_pretrained(root / "converted")
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("model.language_model.", "model.")
        key = key.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        key = key.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
        key = key.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        if not key.startswith("model.vision_tower") or inside:
            state[key] = value
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            state[key] = value[:ROWS]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    if tied:
        del state["lm_head.weight"]
    if language == "internlm2" or names == "internlm2":
        state = internlm(state, 4, 2)
    title = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen", "internlm2": "InternLM2"}[language]
    values = _plain(
        config.text_config,
        {
            "architectures": [f"Llava{title}ForCausalLM"],
            "model_type": "llava" if language == "llama" else f"llava_{title.lower()}",
            "mm_vision_tower": "tower",
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 32,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "image_aspect_ratio": {"Llava": "pad", "LlavaNext": "anyres", "LlavaOnevision": "anyres_max_9"}[kind],
            "mm_patch_merge_type": "flat" if kind == "Llava" else "spatial_unpad",
            "image_grid_pinpoints": [[56, 28], [28, 56], [56, 56]],  # (width, height)
            "tokenizer_padding_side": "right",
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
        },
    )
    _save(root / "in", state, values, chatml() if language == "qwen2" else tokenizer())
    save_tower(root / "tower", model, siglip)
    return Written(root / "in", root / "tower", root / "converted")


def question(folder: Path, model) -> dict:
    """A picture and a question as the model's inputs, by the processor in a folder.

    transformers has LLaVA-OneVision's only where torchvision is installed; its parts do without.
    """
    text = "<image>\nwhat is it?"
    if model.config.model_type == "llava_onevision":
        images = transformers.AutoImageProcessor.from_pretrained(folder)(helpers.picture(), return_tensors="pt")
        pixels = {key: images[key] for key in ("pixel_values", "image_sizes")}
        with torch.no_grad():
            whole = {**pixels, "pixel_values": pixels["pixel_values"].to(torch.bfloat16)}
            (features,) = model.get_image_features(**whole).pooler_output
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = text.replace("<image>", "<image>" * len(features))
        inputs = {**pixels, **tokenizer(text, return_tensors="pt")}
    else:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(images=helpers.picture(), text=text, return_tensors="pt")
    return {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in inputs.items()}
