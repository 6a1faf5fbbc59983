"""What the runner does beyond greedy answers, and how likely an answer is, against a computation token by token."""

import pytest
import torch
from PIL import Image

from llava_fa.eval.likelihood import log_likelihood
from llava_fa.eval.runner import answer, batches, prompt
from llava_fa.hub.loading import load
from llava_fa.world.samples import held_out_samples


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", "cpu", torch.float64)


@pytest.fixture(scope="module")
def samples():
    return held_out_samples(18)


def by_hand(model, processor, picture, question, said):
    """log p of an answer, one token at a time, each from a fresh reading of everything before it."""
    content = [{"type": "image"}] * (picture is not None) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt").to(torch.float64)
    total, greedy = 0.0, True
    for token in processor.tokenizer.encode(" " + said, add_special_tokens=False):
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
        total += float(logits[token] - logits.exp().sum().log())
        greedy &= int(logits.argmax()) == token
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return total, greedy


def test_log_likelihood_is_the_sum_over_the_answers_tokens(tiny, samples):
    model, processor = tiny
    said = ["red", "two blue circles", "yes", "unanswerable", "a red circle and a sign"]
    asked = [(s.image, s.question.text, text) for s, text in zip(samples, said, strict=False)]
    asked.append((samples[0].image, samples[0].question.text, "no"))
    found = log_likelihood(model, processor, asked, batch_size=4)
    for (picture, question, text), (value, greedy) in zip(asked, found, strict=True):
        expected, is_greedy = by_hand(model, processor, picture, question, text)
        assert value == pytest.approx(expected, abs=1e-4)  # the logarithm is taken in float32
        assert greedy == is_greedy
        assert value < 0
    assert len({round(value, 3) for value, _ in found}) == len(found)


def test_what_the_model_says_is_greedy_and_more_likely_than_anything_else(tiny, samples):
    model, processor = tiny
    pairs = [(s.image, s.question.text) for s in samples]
    told = answer(model, processor, pairs)
    own = log_likelihood(model, processor, [(*pair, text) for pair, text in zip(pairs, told, strict=True)])
    other = log_likelihood(model, processor, [(*pair, f"not {text}") for pair, text in zip(pairs, told, strict=True)])
    assert all(greedy for _, greedy in own)
    assert not any(greedy for _, greedy in other)
    assert all(a > b for (a, _), (b, _) in zip(own, other, strict=True))


def test_spaces_around_an_answer_and_the_size_of_batches_change_nothing(tiny, samples):
    model, processor = tiny
    asked = [(s.image, s.question.text, s.question.answer) for s in samples]
    spaced = [(picture, question, f" {text} ") for picture, question, text in asked]
    alone = log_likelihood(model, processor, asked, batch_size=1)
    together = log_likelihood(model, processor, spaced, batch_size=8)
    assert [greedy for _, greedy in alone] == [greedy for _, greedy in together]
    assert [value for value, _ in alone] == pytest.approx([value for value, _ in together], abs=1e-4)


def test_several_pictures_none_and_nothing_to_say(tiny, samples):
    model, processor = tiny
    two, question = [samples[0].image, samples[1].image], samples[0].question.text
    found = log_likelihood(model, processor, [([], question, "red"), (two, question, "red"), (two, question, "")])
    assert found[2] == (0.0, True)
    assert found[0][0] == pytest.approx(by_hand(model, processor, None, question, "red")[0], abs=1e-4)
    assert found[0][0] != pytest.approx(found[1][0], abs=1e-3)
    told = answer(model, processor, [([], question), (two, question), (samples[0].image, question)])
    assert told[2] == answer(model, processor, [(samples[0].image, question)])[0]
    assert all(told)


def test_answers_end_at_the_first_of_the_texts_that_end_them(tiny, samples):
    model, processor = tiny
    captions = [(s.image, s.question.text) for s in samples if s.question.task == "caption"]
    whole = answer(model, processor, captions)
    assert all(" and " in text for text in whole)
    cut = answer(model, processor, captions, until=["zebra", " and "])
    assert cut == [text.split(" and ")[0] for text in whole]


def test_sampling_differs_from_run_to_run_and_greedy_answers_do_not(tiny, samples):
    model, processor = tiny
    pairs = [(s.image, s.question.text) for s in samples]
    torch.manual_seed(0)
    hot = {"do_sample": True, "temperature": 3.0}
    drawn = [answer(model, processor, pairs, sampling=hot, max_new_tokens=8) for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert answer(model, processor, pairs) == answer(model, processor, pairs, sampling={"num_beams": 1})


class Template:
    """A processor whose chat template shows where everything went."""

    def apply_chat_template(self, messages, add_generation_prompt=False):
        said = ""
        for message in messages:
            parts = ("[picture]" if p["type"] == "image" else p["text"] for p in message["content"])
            said += f"{message['role']}:{'|'.join(parts)}\n"
        return said + ("assistant:" if add_generation_prompt else "")


def test_pictures_come_first_or_where_the_question_has_them():
    assert prompt(Template(), 1, "What?") == "user:[picture]|What?\nassistant:"
    assert prompt(Template(), 0, " What? ") == "user: What? \nassistant:"
    assert prompt(Template(), 1, "<image>\nWhat?") == "user:[picture]|What?\nassistant:"
    assert prompt(Template(), 2, "Is <image> or <image> red?") == "user:Is|[picture]|or|[picture]|red?\nassistant:"
    assert prompt(Template(), 1, "Is <image> or <image> red?") == "user:[picture]|Is\nor\nred?\nassistant:"
    assert prompt(Template(), 0, "<image>\nWhat?") == "user:What?\nassistant:"
    assert prompt(Template(), 0, "What?", " red ") == "user:What?\nassistant:red"


def test_an_answer_is_put_after_the_question_where_the_template_says_something_else_in_between():
    class Thinking(Template):
        def apply_chat_template(self, messages, add_generation_prompt=False):
            return super().apply_chat_template(messages, add_generation_prompt).replace("assistant:r", "assistant:<t>r")

    assert prompt(Thinking(), 0, "What?", " red") == "user:What?\nassistant: red"


def test_batches_hold_like_questions():
    sizes = [(5, 1), (3, 0), (9, 1), (1, 2), (2, 0)]
    texts, shown = ["x" * characters for characters, _ in sizes], [[None] * pictures for _, pictures in sizes]
    assert list(batches(texts, shown, 2)) == [[4, 1], [3, 0], [2]]


def test_a_grey_picture_makes_the_right_answer_less_likely(tiny, samples):
    model, processor = tiny
    seen = [s for s in samples if s.question.task in ("attributes", "reading", "relations")]
    asked = [(s.image, s.question.text, s.question.answer) for s in seen]
    grey = [(Image.new("RGB", picture.size, (128, 128, 128)), *rest) for picture, *rest in asked]
    seen_sum, grey_sum = (sum(v for v, _ in log_likelihood(model, processor, rows)) for rows in (asked, grey))
    assert seen_sum > grey_sum + 1
