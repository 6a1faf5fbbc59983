"""The tiny LMM: tokenizer, processor and a randomly initialised `LlavaForConditionalGeneration` in the true format."""

from __future__ import annotations

import random

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from llava_fa.world.questions import TASKS, UNANSWERABLE, ask
from llava_fa.world.render import CHARACTERS, GRID, PATCH
from llava_fa.world.scene import COLORS, IMAGE_SIZE, KINDS, SHAPES, SIZES, sample_scene, scene_rng

USER, ASSISTANT, END, IMAGE, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<image>", "<|pad|>"
NOTHING, OBJECT = "nothing", "object"
"""Words that the dense supervision reads off a patch without an object, and off an object's centre."""

VOCABULARY = 600
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% else %}<|assistant|> {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the world's own sentences; capitals, digits and ``$`` stay single characters.

    Reading is then spelling, one character a token, so that words never seen in training can be read.
    """
    rng = random.Random("tokenizer")
    corpus = [f" {word}" for word in (*COLORS, *SHAPES, *SIZES, *KINDS, NOTHING, OBJECT, UNANSWERABLE)] * 200
    for index in range(3000):
        scene = sample_scene(scene_rng("train", 0, index, "tokenizer"), "train")
        for task in TASKS:
            for question in ask(task, scene, rng):
                corpus += [question.text, f" {question.answer}"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Z](?![a-z])|[0-9$]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, USER, ASSISTANT, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor() -> LlavaProcessor:
    """Image processor (no resize surprise: the world's pictures have the model's size), tokenizer, chat template."""
    from transformers import CLIPImageProcessorPil

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3, do_center_crop=False
    )
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH,
        chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """CLIP vision 192 × 6 on 96 × 96 pictures (64 visual tokens), MLP projector, Qwen2 256 × 5 with grouped queries."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def dense_vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Token ids of the words that the dense supervision chooses between; index 0 is always "nothing"."""

    def word(text: str) -> int:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise AssertionError(f"{text!r} is {len(ids)} tokens; dense supervision needs it to be one")
        return ids[0]

    nothing = word(f" {NOTHING}")
    return {
        "color": [nothing, *(word(f" {name}") for name in COLORS)],
        "shape": [nothing, *(word(f" {name}") for name in (*SHAPES, *KINDS))],
        "size": [nothing, *(word(f" {name}") for name in SIZES)],
        "anchor": [nothing, word(f" {OBJECT}")],
        "character": [nothing, *(word(glyph) for glyph in CHARACTERS)],
    }
