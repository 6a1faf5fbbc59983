"""Calibration without a dataset: what is asked, of which pictures."""

import itertools
import shutil

import helpers
import pytest

from llava_fa import FourierError
from llava_fa.data.asked import PROMPTS, QUESTIONS, Asked, is_album, pictures_in, with_answer


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(3):
        helpers.picture(number).save(folder / f"{number}.png")
    helpers.picture(3).save(folder / "more" / "3.JPG")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def opened(samples, count):
    return [candidate.open() for candidate in itertools.islice(samples.candidates(), count)]


def pictures(sample):
    return [part["image"] for part in sample[0]["content"] if part["type"] == "image"]


def said(sample):
    return sample[0]["content"][-1]["text"]


def test_a_folder_of_pictures_and_no_dataset(album, tmp_path):
    assert [path.name for path in pictures_in(album)] == ["0.png", "1.png", "2.png", "3.JPG"]
    assert is_album(str(album))
    assert not is_album(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert not is_album(str(tmp_path / "empty"))
    (album / "metadata.jsonl").write_text("{}")
    assert not is_album(str(album))


def test_hidden_pictures_are_left_out(album):
    (album / ".thumbnails").mkdir()
    shutil.copy(album / "0.png", album / ".thumbnails" / "0.png")
    assert len(pictures_in(album)) == 4


def test_every_sample_ends_with_a_question_and_one_of_four_is_text(album):
    samples = opened(Asked(str(album), count=16), 16)
    assert all(len(sample) == 1 and sample[0]["role"] == "user" for sample in samples)
    shown = [len(pictures(sample)) for sample in samples]
    assert shown == [1, 1, 1, 0] * 4
    assert all(said(sample) in (QUESTIONS if pictures(sample) else PROMPTS) for sample in samples)


def test_every_picture_is_shown_before_one_is_shown_again_and_never_with_the_same_question(album):
    everything = [sample for sample in opened(Asked(str(album), count=1), 1000) if pictures(sample)]
    pairs = [(str(pictures(sample)[0]), said(sample)) for sample in everything]
    assert len(set(pairs)) == len(pairs) == 4 * len(QUESTIONS)
    assert len({picture for picture, _ in pairs[:4]}) == 4


def test_the_users_own_questions_come_first(album):
    asked = Asked(str(album), count=4, ask=("Was ist zu sehen?",))
    first = next(sample for sample in opened(asked, 8) if pictures(sample))
    assert said(first) == "Was ist zu sehen?"


def test_the_draw_hangs_on_the_seed_alone(album):
    def shown(seed):
        return [(pictures(sample), said(sample)) for sample in opened(Asked(str(album), seed=seed), 24)]

    assert shown(0) == shown(0)
    assert len({str(shown(seed)) for seed in range(8)}) > 1


def test_a_model_without_eyes_is_given_text_alone(album):
    samples = opened(Asked(str(album), sees=False), 1000)
    assert len(samples) == len(PROMPTS)
    assert not any(pictures(sample) for sample in samples)


def test_drawn_pictures_in_the_place_of_a_folder():
    calls = []

    def draw(count, seed):
        calls.append((count, seed))
        return [(f"picture {index}", "asked?", "told") for index in range(count)]

    samples = opened(Asked("self", count=8, seed=5, draw=draw), 8)
    assert calls == [(8, 5)]
    assert [pictures(sample) for sample in samples[:3]] == [["picture 0"], ["picture 1"], ["picture 2"]]
    assert "told" not in str(samples)
    assert "asked?" not in str(samples)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FourierError, match="no pictures in it"):
        opened(Asked(str(tmp_path)), 1)


def test_an_answer_becomes_the_last_turn_and_silence_does_not():
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    answered = with_answer(question, "yes")
    assert answered[:1] == question
    assert answered[1] == {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    assert with_answer(question, "") == question
