"""The looking loss is what its docstring says, and what a question should look at is what is there."""

import random

import numpy as np
import pytest
import torch

from llava_fa.world.looking import HEADS, LAYERS, MOST_LOOKS, Looks, looking_loss, watched
from llava_fa.world.model import build_model, build_processor
from llava_fa.world.packing import PREFIX, WorldBatches, attention_mask
from llava_fa.world.questions import TASKS, Question, ask
from llava_fa.world.render import character_patches, patch_labels
from llava_fa.world.scene import Scene, Thing, Writing, sample_scene, scene_rng

RED = Thing("red", "circle", "small", 18, 18, 9)
BLUE = Thing("blue", "circle", "large", 66, 30, 15)
SIGN = Writing("sign", "CAT", "green", 42, 78)
SCENE = Scene((RED, BLUE), (SIGN,), "clear")


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def encode(processor):
    return lambda text: tuple(processor.tokenizer.encode(text, add_special_tokens=False))


def looks_of(question, encode, scene=SCENE):
    """[layer] → list of (token looked from, positions of head 0, positions of head 2), text at PREFIX."""
    looks = Looks(scene, patch_labels(scene).focus, encode, offset=1)
    asked = encode(question.text)
    looks.add(question, PREFIX, PREFIX + len(asked) + 1)
    tokens = [*asked, "mark", *encode(f" {question.answer}")]
    found = []
    for origins, targets in zip(looks.look_from, looks.look_to, strict=True):
        rows = zip(origins[origins >= 0], targets[origins >= 0], strict=True)
        found.append([(tokens[at - PREFIX], *([int(p) for p in head if p >= 0] for head in to)) for at, to in rows])
    return found


def patch(item):
    return 1 + int(item.y // 12) * 8 + int(item.x // 12)


def test_a_relation_looks_at_the_first_thing_and_at_the_second(encode):
    mentions = ("red circle", (RED,)), ("blue circle", (BLUE,))
    question = Question("relations", "Is the red circle above or below the blue circle?", "above", mentions=mentions)
    phrases, answer, options = looks_of(question, encode)
    circle = encode(" circle")[0]
    assert phrases == [
        (circle, [patch(RED)], [0, patch(RED)]),
        (circle, [patch(BLUE)], [0, patch(BLUE)]),
    ]
    assert answer == [("mark", [patch(RED)], [patch(BLUE)])]
    assert options == []


def test_what_is_not_there_is_looked_for_at_the_first_token_and_what_is_there_is_counted(encode):
    absent = Question("existence", "Is there a pink star in the image?", "no", mentions=(("pink star", ()),))
    assert looks_of(absent, encode)[1] == [("mark", [0], [0])]
    both = Question("counting", "How many circles are there?", "2", mentions=(("circles", (RED, BLUE)),))
    places = sorted([patch(RED), patch(BLUE)])
    assert looks_of(both, encode)[1] == [("mark", places, [0, *places])]


def test_spelling_looks_at_the_next_character(encode):
    question = Question("reading", "What does the sign say?", "CAT", mentions=(("sign", (SIGN,)),), spelled=(SIGN,))
    spelled = looks_of(question, encode)[1][1:]
    places = [1 + place for place in character_patches(SIGN)]
    assert len(set(places)) == 3
    before = [encode(" C")[0], encode("C")[0], encode("A")[0]]  # the space, then what has been read so far
    assert spelled == [(token, [at], [at]) for token, at in zip(before, places, strict=True)]


def test_a_caption_looks_at_what_it_names_next_and_options_at_the_right_one(encode):
    caption = Question("caption", "Describe the image.", "a red circle and a sign", spelled=(RED, SIGN))
    rows = looks_of(caption, encode)[1]
    sign = sorted(1 + np.flatnonzero(patch_labels(SCENE).focus == 3))
    assert rows[0] == ("mark", [patch(RED)], [patch(RED)])
    assert rows[-1] == (encode(" a")[0], sign, sign)
    text = "What color is the sign?\nA. red\nB. green\nC. pink"
    question = Question("choice", text, "B", mentions=(("sign", (SIGN,)),))
    value = PREFIX + len(encode(text[: text.index("green") + 5])) - 1
    assert encode(text)[value - PREFIX] == encode(" green")[0]
    assert looks_of(question, encode)[2] == [("mark", [value], [value])]


def test_every_question_of_every_task_has_its_phrases_in_the_text_and_items_in_the_scene():
    for number in range(120):
        rng = scene_rng("train", 5, number)
        scene = sample_scene(rng, "train")
        for task in TASKS:
            for question in ask(task, scene, random.Random(number)):
                assert question.mentions or question.spelled
                assert all(phrase in question.text for phrase, _ in question.mentions)
                items = [item for _, meant in question.mentions for item in meant] + list(question.spelled)
                assert all(any(item is known for known in (*scene.things, *scene.writings)) for item in items)


def test_the_loss_is_the_divergence_of_the_models_own_attention(processor):
    """Against the probabilities that transformers' eager attention returns."""
    model = build_model(processor.tokenizer, 3).eval()
    language = model.model.language_model
    language.set_attn_implementation("eager")
    settings = {"split": "train", "seed": 0, "batch": 2, "text": 96, "start": 0, "stop": 1}
    batch = WorldBatches(processor.tokenizer, **settings, tasks=("choice", "counting"))[0]
    modules = [language.layers[number].self_attn for number in LAYERS]
    with torch.no_grad(), watched(modules) as seen:
        mask = attention_mask(batch["segment"])
        embeds = model.get_input_embeddings()(batch["ids"])
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": batch["position"]}
        out = language(**inputs, output_attentions=True)
        for index, number in enumerate(LAYERS):
            losses = []
            for row in range(2):
                for at, targets in zip(batch["look_from"][row, index], batch["look_to"][row, index], strict=True):
                    for head, wanted in zip(HEADS, targets, strict=True):
                        wanted = wanted[wanted >= 0]
                        if at >= 0:
                            share = out.attentions[number][row, head, at, wanted].double()
                            losses.append(-(share.log().mean() + np.log(len(wanted))))
            assert losses
            loss = looking_loss(modules[index], seen[index], batch["look_from"][:, index], batch["look_to"][:, index])
            torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
            nothing = torch.full_like(batch["look_from"][:, index], -1)
            assert looking_loss(modules[index], seen[index], nothing, batch["look_to"][:, index]) == 0
    assert batch["look_from"].shape[-1] == MOST_LOOKS
