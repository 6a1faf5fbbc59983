"""Checkpoints of published models' shapes with random weights: they say nothing, at the size and speed of ones that do.

    .venv/bin/python benchmarks/shapes.py qwen2.5-vl-7b runs/shapes/qwen2.5-vl-7b            # 16.6 GB
    .venv/bin/python benchmarks/shapes.py llava-1.5-7b runs/shapes/llava-1.5-7b              # 14.1 GB
    .venv/bin/python benchmarks/shapes.py qwen3-vl-30b-a3b runs/shapes/qwen3 --most 40GB     # fewer layers
    .venv/bin/python benchmarks/shapes.py llava-1.5b runs/shapes/llava-1.5b                  # CLIP-L and Qwen2.5-1.5B

Configurations are the published ones, written out here; names and shapes of tensors are those that transformers saves
such a model with. Matrices are normal with a variance of 1 / inputs, norms one, biases zero: activations keep their
scale through any number of layers. A tensor's numbers depend on its name and --seed alone. With a tokenizer of invented
words and the picture processor of the family, so that `llava-fa` takes the folder as any model's (Qwen's processors
need torchvision, as always in transformers).

bf16, in shards of about 4 GB, written some millions of numbers at a time; a shard is there whole or not at all, and one
that is there is not written again. config.json comes last. --most: of language layers only so many as fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import arguments, clip_large, write_json

_SHARD = 4 * 10**9
_CHUNK = 1 << 22
"""Numbers drawn at once."""
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
QWEN_TOKENS = {
    151643: "<|endoftext|>",
    151644: "<|im_start|>",
    151645: "<|im_end|>",
    151652: "<|vision_start|>",
    151653: "<|vision_end|>",
    151654: "<|vision_pad|>",
    151655: "<|image_pad|>",
    151656: "<|video_pad|>",
}
_QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def llava_1_5b(layers: int | None = None, picture: int = 336) -> Any:
    """LLaVA of CLIP-L and Qwen2.5-1.5B, whose words are its own (`tokenizer`)."""
    from transformers import LlavaConfig, Qwen2Config

    text = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers or 28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = clip_large()
    vision.image_size = picture
    seen = (picture // vision.patch_size) ** 2
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=3, image_seq_length=seen, tie_word_embeddings=True
    )


def llava_1_5_7b(layers: int | None = None) -> Any:
    """llava-hf/llava-1.5-7b-hf."""
    from transformers import LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers or 32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=32001,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=clip_large(),
        image_token_index=32000,
        image_seq_length=576,
        tie_word_embeddings=False,
    )


def qwen2_5_vl_7b(layers: int | None = None) -> Any:
    """Qwen/Qwen2.5-VL-7B-Instruct."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers or 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "sliding_window": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 3584,
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


def qwen3_vl_30b_a3b(layers: int | None = None) -> Any:
    """Qwen/Qwen3-VL-30B-A3B-Instruct."""
    from transformers import Qwen3VLMoeConfig

    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    text = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": layers or 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


SHAPES: dict[str, Callable[..., Any]] = {
    "llava-1.5b": llava_1_5b,
    "llava-1.5-7b": llava_1_5_7b,
    "qwen2.5-vl-7b": qwen2_5_vl_7b,
    "qwen3-vl-30b-a3b": qwen3_vl_30b_a3b,
}


def empty(config: Any) -> Any:
    """The model of a configuration, in bf16 on meta."""
    import transformers

    kind = getattr(transformers, type(config).__name__.removesuffix("Config") + "ForConditionalGeneration")
    with torch.device("meta"):
        return kind(config).to(torch.bfloat16).eval()


def stored(model: Any) -> dict[str, torch.Size]:
    """Name → shape of the tensors that transformers saves a model as, tied ones once."""
    from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

    tied = set(model.all_tied_weights_keys)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    made = revert_weight_conversion(model, own)
    return {name: made[name].shape for name in sorted(made, key=dot_natural_key)}


def fitting(shape: str, most: float | None) -> Any:
    """The configuration of a shape, with so many language layers that its bf16 weights take no more than ``most``."""
    config = SHAPES[shape]()
    if most is None:
        return config
    whole, count = _bytes(config), config.get_text_config().num_hidden_layers
    layer = whole - _bytes(SHAPES[shape](layers=count - 1))
    over = max(0, math.ceil((whole - most) / layer))
    if over >= count:
        raise SystemExit(f"one layer alone takes {(whole - (count - 1) * layer) / 1e9:.1f} GB: give --most more")
    return SHAPES[shape](layers=count - over)


def _bytes(config: Any) -> int:
    return sum(2 * size.numel() for size in stored(empty(config)).values())


def numbers(name: str, shape: torch.Size, seed: int) -> Iterator[torch.Tensor]:
    """A tensor's numbers, bf16, some at a time."""
    left = shape.numel()
    if len(shape) < 2:
        yield torch.full((left,), float(name.endswith("weight")), dtype=torch.bfloat16)
        return
    # Of experts that are stacked either axis may be the inputs.
    inputs = max(shape[1:]) if len(shape) == 3 else shape[1:].numel()
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    while left:
        count = min(left, _CHUNK)
        yield torch.randn(count, generator=generator).mul_(inputs**-0.5).bfloat16()
        left -= count


def write(config: Any, folder: Path, seed: int = 0) -> None:
    """The checkpoint, with what else `llava-fa` reads of a folder; what of it is there already is left as it is."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = empty(config)
    shards = _shards(stored(model))
    total = sum(2 * size.numel() for shard in shards for size in shard.values())
    files = {f"model-{index:05}-of-{len(shards):05}.safetensors": shard for index, shard in enumerate(shards, 1)}
    done, start = 0, time.monotonic()
    for file, shard in files.items():
        if not (folder / file).exists():
            _write_shard(folder / file, shard, seed)
        done += sum(2 * size.numel() for size in shard.values())
        print(f"{folder}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {time.monotonic() - start:.0f} s", flush=True)
    places = {name: file for file, shard in files.items() for name in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    write_processor(config, folder)
    model.generation_config.save_pretrained(folder)
    text = json.loads(config.to_json_string()) | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    write_json(folder / "config.json", text)


def _shards(tensors: dict[str, torch.Size]) -> list[dict[str, torch.Size]]:
    shards: list[dict[str, torch.Size]] = [{}]
    for name, size in tensors.items():
        if shards[-1] and sum(2 * other.numel() for other in shards[-1].values()) + 2 * size.numel() > _SHARD:
            shards.append({})
        shards[-1][name] = size
    return shards


def _write_shard(path: Path, shard: dict[str, torch.Size], seed: int) -> None:
    from llava_fa.hub.shards import Item, tensor_bytes, write_file

    total, written = sum(size.numel() for size in shard.values()), 0

    def data(name: str, size: torch.Size) -> Iterator[bytes]:
        nonlocal written
        for some in numbers(name, size, seed):
            yield tensor_bytes(some)
            written += some.numel()
            if sys.stderr.isatty():
                print(f"\r{path.name}: {written / total:.0%}", end="\n" if written == total else "", file=sys.stderr)

    write_file(
        path,
        [
            Item(name, "BF16", tuple(size), 2 * size.numel(), lambda name=name, size=size: data(name, size))
            for name, size in shard.items()
        ],
    )


def tokenizer(size: int, tokens: dict[int, str], **special: str) -> Any:
    """A tokenizer of so many words: these at their ids, w4, w5 … at all others; any other word is <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {tokens.get(index, f"w{index}"): index for index in range(size)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="")
    marks = [token for token in tokens.values() if token not in special.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=marks, padding_side="left", **special
    )


def write_processor(config: Any, folder: Path) -> None:
    """The files of a processor: LLaVA's by its class; Qwen's, whose class wants torchvision, written as published."""
    text = config.get_text_config()
    if config.model_type == "llava":
        _llava_processor(config, text).save_pretrained(folder)
        return
    words = tokenizer(
        text.vocab_size,
        {0: "<unk>", **QWEN_TOKENS},
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    vision, name = config.vision_config, "Qwen3VL" if "qwen3" in config.model_type else "Qwen2_5_VL"
    side = vision.patch_size * vision.spatial_merge_size
    patches = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "size": {"shortest_edge": 4 * side**2, "longest_edge": 16384 * side**2},
        "processor_class": f"{name}Processor",
    }
    pictures = {"image_processor_type": "Qwen2VLImageProcessorFast", **patches}
    clips = {"video_processor_type": f"{'Qwen3VL' if name == 'Qwen3VL' else 'Qwen2VL'}VideoProcessor", **patches}
    write_json(folder / "preprocessor_config.json", pictures)
    write_json(folder / "video_preprocessor_config.json", clips)


def _llava_processor(config: Any, text: Any) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image, pad, end = config.image_token_index, text.pad_token_id, text.eos_token_id
    unk = next(index for index in range(text.vocab_size) if index not in (image, pad, end, text.bos_token_id))
    tokens = {image: "<image>", pad: "<pad>", end: "<end>", unk: "<unk>"}
    words = tokenizer(text.vocab_size, tokens, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        words,
        patch_size=config.vision_config.patch_size,
        chat_template=LLAVA_TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def gigabytes(text: str) -> float:
    """``40GB`` → bytes."""
    match = re.fullmatch(r"([0-9.]+) ?GB", text)
    if not match:
        raise SystemExit(f"--most {text}: give a size such as 40GB")
    return float(match[1]) * 1e9


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=gigabytes, help="of the weights, such as 40GB: fewer language layers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(fitting(args.shape, args.most), args.folder, args.seed)


if __name__ == "__main__":
    main()
