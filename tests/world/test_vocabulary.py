"""Whatever the world says has its words in the vocabulary; what is written in its pictures is spelled."""

import pytest

from llava_fa.world import vocabulary
from llava_fa.world.packing import TASK_NAMES
from llava_fa.world.questions import ask
from llava_fa.world.scene import WORDS, sample_scene, scene_rng
from llava_fa.world.vocabulary import MARKS, build_tokenizer, learn_merges


@pytest.fixture(scope="module")
def sentences():
    """What is asked and answered about 800 pictures; what training holds out is said about the second half."""
    found = set()
    for split in ("train", "test"):
        for index in range(400):
            rng = scene_rng(split, 0, index)
            scene = sample_scene(rng, split, "ruined" if index % 40 == 0 else None)
            for task in TASK_NAMES:
                for question in ask(task, scene, rng, split):
                    found |= {question.text, f" {question.answer}"}
    return sorted(found)


def pieces(tokenizer, sentence):
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(sentence)]


def test_every_word_that_is_said_is_one_token(sentences):
    """No word in fragments: each piece between spaces, and each character that is spelled, has a number of its own."""
    tokenizer = build_tokenizer()
    said = {piece for sentence in sentences for piece in pieces(tokenizer, sentence)}
    assert {"Describe", "Ġobjects", "Ġcrosses", "Ġunanswerable", "Ġleftmost", "7", "$"} <= said
    assert sorted(said - set(tokenizer.get_vocab())) == []
    for sentence in sentences:
        ids = tokenizer.encode(sentence, add_special_tokens=False)
        assert tokenizer.decode(ids) == sentence
        assert len(ids) == len(pieces(tokenizer, sentence))


def test_what_is_written_is_spelled():
    tokenizer = build_tokenizer()
    for text in (*WORDS, "$27", "B4"):
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False)) == list(text)


def test_marks_come_first_and_are_never_said(sentences):
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(range(len(MARKS))) == list(MARKS)
    assert tokenizer.pad_token_id == 0
    assert not any(mark in sentence for mark in MARKS for sentence in sentences)


def test_merges_learnt_anew_would_do(tmp_path, monkeypatch, sentences):
    """The command behind the file: what it writes is a vocabulary of the same world, its words perhaps renumbered."""
    file = tmp_path / "merges.txt"
    file.write_text("\n".join([*learn_merges(scenes=400), ""]), encoding="utf-8")
    monkeypatch.setattr(vocabulary, "MERGES", file)
    again = build_tokenizer()
    assert 300 < len(again) <= vocabulary.VOCABULARY
    said = {piece for sentence in sentences for piece in pieces(again, sentence)}
    assert sorted(said - set(again.get_vocab())) == []
