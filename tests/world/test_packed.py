"""Packed samples teach any trainer exactly what the questions alone would."""

import pytest
import torch

from llava_fa.hub.loading import load
from llava_fa.train.data import Collator, Conversations
from llava_fa.train.loss import IGNORED, answers
from llava_fa.world.packed import PackedWorld
from llava_fa.world.packing import PREFIX


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", "cpu", torch.float32)


def test_a_packed_sequence_asks_each_question_as_if_it_were_alone(tiny):
    model, processor = tiny
    item = PackedWorld(processor, pictures=3)[1]
    with torch.no_grad():
        packed, labels, _ = answers(model, Collator(0)([item]))
    assert len(labels) == (item["labels"] != IGNORED).sum() > 10
    at = 0
    places = item["position_ids"]
    starts = [i for i in range(PREFIX, len(places)) if places[i] == PREFIX]
    for start, end in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True):
        own = torch.cat([torch.arange(PREFIX), torch.arange(start, end)])
        single = {
            "input_ids": item["input_ids"][own][None],
            "labels": item["labels"][own][None],
            "pixel_values": item["pixel_values"],
        }
        with torch.no_grad():
            alone, wanted, _ = answers(model, single)
        assert torch.equal(wanted, labels[at : at + len(wanted)])
        torch.testing.assert_close(alone, packed[at : at + len(wanted)], rtol=1e-3, atol=1e-3)
        at += len(wanted)
    assert at == len(labels)


def test_conversations_and_packed_samples_agree_on_what_a_question_is(tiny):
    """The same question through the chat template has the same tokens and labels."""
    _, processor = tiny
    from llava_fa.world.samples import calibration_samples

    image, question, answer = calibration_samples(1)[0]
    item = Conversations([(image, question, answer)], processor, max_length=512)[0]
    tokenizer = processor.tokenizer
    learnt = item["input_ids"][0][item["labels"][0] != IGNORED]
    end = [*tokenizer.encode(f" {answer}", add_special_tokens=False), tokenizer.eos_token_id]
    assert learnt.tolist() == end


def test_pictures_are_the_same_everywhere(tiny):
    first, again = (PackedWorld(tiny[1], pictures=8)[5] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["pixel_values"].shape == (1, 3, 96, 96)
