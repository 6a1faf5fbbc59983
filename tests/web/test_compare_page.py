"""What the page says, and which pictures it takes; without gradio."""

import io

import pytest
from PIL import Image

from llava_fa.errors import FourierError
from llava_fa.serve.limits import Limits
from llava_fa.web import view
from llava_fa.web.desk import Question, Ticket
from llava_fa.web.pictures import read_picture, write_examples
from llava_fa.web.side import Answer, Side
from llava_fa.world.samples import held_out_samples

ORIGINAL = Side("big", None, None, 12_000_000, 24_000_000, "float32", None, (1, 4, 16), 16, False)
COMPRESSED = Side("small", None, None, 2_000_000, 3_000_000, "float32", 2.12, (1, 4, 16), 4, True)
SIDES = (ORIGINAL, COMPRESSED)


def asked(text="what?", **options):
    return Ticket(Question(Image.new("RGB", (4, 4)), text, 9, **options), end=float("inf"))


def sentence(one, ahead=0):
    return view.standing(one, ahead)


def saved(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_figures_of_an_answer():
    answer = Answer(
        text="a", tokens=5, prompt_tokens=70, visual_tokens=64, began=10.0, first=10.25, last=12.25, ended=12.5
    )
    text = view.figures(SIDES, 1, answer)
    for part in (
        "250 ms",
        "2.50 s",
        "2.0 tokens/s",
        "64 of them the picture",
        "2.0 MB",
        "6.0× smaller",
        "8.0× smaller",
    ):
        assert part in text
    assert "shared" not in text
    assert "smaller" not in view.figures(SIDES, 0, answer)
    assert "6.0× larger" in view.figures((COMPRESSED, ORIGINAL), 1, Answer())


def test_times_that_are_not_the_models_own_say_so():
    answer = Answer(shared=True, began=1.0, first=2.0, last=3.0, ended=4.0, tokens=2)
    assert view.figures(SIDES, 0, answer).count("shared the machine") == 3
    assert "shared" not in view.figures(SIDES, 0, Answer(shared=True))  # nothing measured yet


def test_answers_and_questions_are_text_and_never_markup():
    hostile = '<img src=x onerror=alert(1)> ${1+1} {{2}} & "quotes"'
    for markup in (
        view.answer_text(Answer(text=hostile, began=1.0)),
        view.problem(hostile),
        view.right_answer(hostile),
        view.standing(asked(hostile), 0),
    ):
        assert "<img" not in markup
        assert "&lt;img src=x" in markup


def test_where_a_question_stands():
    one = asked()
    assert "Waiting: 3 before you." in sentence(one, 3)
    one.started = True
    assert "The original model is answering" in sentence(one)
    one.answers[1].began = 1.0
    assert "The compressed model is answering" in sentence(one)
    one.finish()
    one.answers[0].text, one.answers[1].text = "Yes ", "Yes"
    assert "Both gave the same answer." in sentence(one)
    one.answers[1].text = "No"
    assert "The answers differ." in sentence(one)
    one.cancel()
    assert "Stopped." in sentence(one)
    one.late = True
    assert "the time that a question may take is over" in sentence(one)
    one.error = "the model has no such thing"
    assert "The model has no such thing." in sentence(one)
    assert 'role="alert"' in sentence(one)


def test_an_answer_of_nothing_and_one_that_was_cut():
    assert "(nothing)" in view.answer_text(Answer(began=1.0, ended=2.0))
    assert "…" in view.answer_text(Answer(began=1.0))
    assert "cut at the longest answer" in view.answer_text(Answer(text="a b", began=1.0, ended=2.0, cut=True))


def test_the_slider_says_numbers_of_tokens_and_whether_they_were_trained():
    assert view.tokens_label(ORIGINAL, 2) == "Visual tokens: 16 (all)"
    assert view.tokens_label(ORIGINAL, 1) == "Visual tokens: 4 (pooled, not trained for it)"
    assert view.tokens_label(COMPRESSED, 1) == "Visual tokens: 4"
    assert [f">{count}<" in view.scale(ORIGINAL) for count in (1, 4, 16, 64)] == [True, True, True, False]


def test_an_uploaded_picture_is_upright_and_rgb(tmp_path):
    image = Image.new("RGB", (20, 10), "red")
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright: to be turned a quarter to the right
    found = read_picture(saved(tmp_path, image, exif=exif), Limits())
    assert found.size == (10, 20)
    assert found.getpixel((9, 0)) == (0, 0, 255)
    assert read_picture(saved(tmp_path, Image.new("LA", (3, 3))), Limits()).mode == "RGB"
    grey = Image.new("I;16", (3, 3), 128 * 256)
    assert read_picture(saved(tmp_path, grey), Limits()).getpixel((1, 1)) == (128, 128, 128)


def test_pictures_that_are_not_taken(tmp_path):
    with pytest.raises(FourierError, match=r"there is no picture\. Upload one, or pick an example"):
        read_picture(None, Limits())
    with pytest.raises(FourierError, match="not here any more"):
        read_picture(tmp_path / "gone.png", Limits())
    path = saved(tmp_path, Image.new("RGB", (40, 30)))
    with pytest.raises(FourierError, match="more than 1199 pixels"):
        read_picture(path, Limits(pixels=1199))
    assert read_picture(path, Limits(pixels=1200)).size == (40, 30)
    with pytest.raises(FourierError, match="more than 50 bytes"):
        read_picture(path, Limits(image_bytes=50))
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(FourierError, match="not a readable image"):
        read_picture(path, Limits())
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "TIFF")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(FourierError, match="not a readable image"):
        read_picture(path, Limits())


def test_examples_are_the_worlds_pictures_with_right_answers(tmp_path):
    examples = write_examples(tmp_path)
    world = {(s.question.text, s.question.answer): s.image for s in held_out_samples(9)}
    assert len(examples) == 9
    assert len({path for path, _, _ in examples}) == 9
    for path, question, answer in examples:
        with Image.open(path) as image:
            assert image.convert("RGB").tobytes() == world[question, answer].tobytes()
