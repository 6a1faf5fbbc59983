"""The words of the tiny LMM: a byte-level BPE whose merges are data (`merges.txt`), no by-product of the questions.

The weights know words by their numbers. The merges were learnt once, from the world's sentences, and stay: another
question in the same words changes nothing here. A world that needs new words gets a new file,

    python -m llava_fa.world.vocabulary

which overwrites it, and then a model trained anew; `tests/world/test_tiny.py` fails until both are done.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from llava_fa.world.questions import TASKS, UNANSWERABLE, ask
from llava_fa.world.render import CHARACTERS
from llava_fa.world.scene import COLORS, KINDS, SHAPES, SIZES, sample_scene, scene_rng

USER, ASSISTANT, END, IMAGE, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<image>", "<|pad|>"
MARKS = (PAD, USER, ASSISTANT, END, IMAGE)
NOTHING, OBJECT = "nothing", "object"
"""Words that the dense supervision reads off a patch without an object, and off an object's centre."""

MERGES = Path(__file__).parent / "merges.txt"
VOCABULARY = 600


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `MERGES`: the marks, the 256 bytes, one token a merge, numbered in this order.

    Capitals, digits and ``$`` stay single characters: reading is then spelling, one character a token, so that words
    never seen in training can be read.
    """
    merges = [tuple(line.split(" ")) for line in MERGES.read_text(encoding="utf-8").splitlines()]
    tokens = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = _tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.add_special_tokens(list(MARKS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": IMAGE},
    )


def learn_merges(scenes: int = 3000) -> list[str]:
    """The text of `MERGES`, line by line, learnt from the sentences about this many training scenes
    until every word that is said is one token, or the vocabulary is full.
    """
    rng = random.Random("tokenizer")
    corpus = [f" {word}" for word in (*COLORS, *SHAPES, *SIZES, *KINDS, NOTHING, OBJECT, UNANSWERABLE)] * 200
    for index in range(scenes):
        scene = sample_scene(scene_rng("train", 0, index, "tokenizer"), "train")
        for task in TASKS:
            for question in ask(task, scene, rng):
                corpus += [question.text, f" {question.answer}"]
    tokenizer = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return [f"{left} {right}" for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Z](?![a-z])|[0-9$]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = token_decoders.ByteLevel()
    return tokenizer


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


if __name__ == "__main__":
    MERGES.write_text("\n".join([*learn_merges(), ""]), encoding="utf-8")
