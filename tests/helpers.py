"""What several test folders share: a random LLaVA in the true format with a forward of milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def random_llava(seed: int = 0, *, hidden: int = 48, layers: int = 2, tied: bool = False):
    """A random float32 `LlavaForConditionalGeneration`: CLIP vision (16 patches), MLP projector, Qwen2."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    text = Qwen2Config(
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=1,
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):  # so that a norm's γ carries information
                parameter.copy_(0.5 + torch.rand(parameter.shape))
            elif name.endswith("proj.weight") or (".fc" in name and name.endswith("weight")):
                parameter.mul_(4)  # so that logits depend on every layer
    return model


def processor():
    """A `LlavaProcessor` with a byte-level BPE without merges, made on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", "<image>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        bos_token="<end>",
        pad_token="<end>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        images,
        fast,
        patch_size=7,
        chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save_llava(folder: Path, *, model=None, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """Save a random LLaVA with its processor, under published names (not module names)."""
    model = random_llava() if model is None else model
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    processor().save_pretrained(folder)
    return Path(folder)


def save_text_model(folder: Path) -> Path:
    """A language model that reads text alone, random, with the same tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
                         pad_token_id=0, max_position_embeddings=256)  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = processor().tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def picture(seed: int = 0, size: int = 40) -> Image.Image:
    """A random picture."""
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def inputs_for(folder_processor, seed: int = 0) -> dict:
    """Processor output for one picture and a short question."""
    return folder_processor(images=picture(seed), text="USER: <image>\nwhat is it? ASSISTANT: ", return_tensors="pt")


def assert_as_accurate(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor, atol: float = 1e-6) -> None:
    """The tolerance rule, against float64: max error < 2 × that of plain PyTorch at the same dtype + atol."""
    assert ours.dtype == torchs.dtype
    assert ours.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (torchs.double() - exact).abs().max().item() + atol
    assert error < allowed, f"error {error:.3g}, allowed {allowed:.3g}"
