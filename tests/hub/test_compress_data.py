"""Calibration samples as the model's inputs, and what is done about those that cannot be used."""

import json

import helpers
import pytest
import torch

import llava_fa
from llava_fa import FourierError
from llava_fa.data.rows import SampleSource
from llava_fa.hub.calibration_data import fingerprint, prepare, prepare_all, render


def test_what_the_model_is_given():
    processor = helpers.processor()
    sample = (helpers.picture(), "what?", "that")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": helpers.picture()}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": "that"},
    ]
    (ours,), (theirs,) = list(prepare([sample], processor)), list(prepare([messages], processor))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    text = processor.tokenizer.decode(ours["input_ids"][0])
    assert text == "USER: " + "<image>" * 16 + "\nwhat?\nASSISTANT: that\n"
    assert ours["pixel_values"].shape == (1, 3, 28, 28)


def test_without_a_chat_template_the_llava_form_is_used():
    processor = helpers.processor()
    processor.chat_template = None
    (inputs,) = prepare([(helpers.picture(), "what?", "that")], processor)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text == "USER: " + "<image>" * 16 + "\nwhat? ASSISTANT: that"


def test_fingerprints_tell_samples_apart():
    processor = helpers.processor()

    def of(seed, answer):
        return fingerprint(prepare([(helpers.picture(seed), "what?", answer)], processor))

    assert of(0, "a") == of(0, "a")
    assert len({of(0, "a"), of(1, "a"), of(0, "b")}) == 3


INTERLEAVED = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Before:"},
            {"type": "image", "image": helpers.picture(0)},
            {"type": "text", "text": "After:"},
            {"type": "image", "image": helpers.picture(1)},
        ],
    },
    {"role": "assistant", "content": "one fell"},
]


@pytest.mark.parametrize("template", [helpers.CHAT_TEMPLATE, None], ids=["chat template", "LLaVA's form"])
def test_pictures_between_words_stay_there(template):
    processor = helpers.processor()
    processor.chat_template = template
    (inputs,) = prepare([INTERLEAVED], processor)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    picture = "<image>" * 16
    assert text.startswith(f"USER: Before:{picture}\nAfter:{picture}\n")
    (first,), (second,) = (prepare([(helpers.picture(i), "", "")], processor) for i in range(2))
    assert torch.equal(inputs["pixel_values"], torch.cat([first["pixel_values"], second["pixel_values"]]))


def test_a_template_may_have_pictures_first():
    """As the embedded model's has them: that is how it was trained, and all of the text is there."""
    from llava_fa.hub.loading import load_processor
    from llava_fa.hub.source import resolve_model

    text = render(load_processor(resolve_model("tiny")), INTERLEAVED)
    assert text == "<|user|><image><image>Before:After:<|assistant|> one fell<|end|>"


@pytest.fixture
def rows(tmp_path):
    """Eight rows, of which number 2 has no picture, 4 is too long, and 5 is none."""
    rows = []
    for i in range(8):
        helpers.picture(i).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\nwhat is {i}?"}, {"from": "gpt", "value": f"it is {i}"}]
        rows.append({"image": f"{i}.png", "conversations": turns})
    (tmp_path / "2.png").unlink()
    rows[4]["conversations"][1]["value"] = "long " * 100
    del rows[5]["conversations"]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_sample_longer_than_the_context_is_refused_with_its_row(rows, checkpoint, quick, tmp_path, monkeypatch):
    some = json.loads(rows.read_text())
    rows.write_text(json.dumps([some[0], some[4]]))
    monkeypatch.setattr("llava_fa.hub.calibrated_model._load", lambda *_: pytest.fail("the model is loaded"))
    message = r"rows\.json row 1: it has 5\d\d tokens, and there is room for 256\. .* or give --skip"
    with pytest.raises(FourierError, match=message):
        llava_fa.compress(checkpoint, tmp_path / "out", quick, SampleSource(str(rows)))
    with pytest.raises(FourierError, match=r"calibration sample 1: it has \d+ tokens, and there is room for 256"):
        llava_fa.compress(checkpoint, tmp_path / "out", quick, list(SampleSource(str(rows))))


def test_bad_rows_give_their_places_to_the_next(rows):
    processor, source = helpers.processor(), SampleSource(str(rows), count=5, seed=0)
    with pytest.raises(FourierError, match=r"rows\.json row .*, or give --skip-bad-rows"):
        prepare_all(source, processor, 256)
    found = prepare_all(source, processor, 256, skip_bad_rows=True)
    assert len(found.samples) == len(found.inputs) == 5
    assert all("pixel_values" in inputs for inputs in found.inputs)
    drawn = [candidate.where for candidate in source.candidates()]
    bad = [f"rows.json row {i}" for i in (2, 4, 5)]
    looked_at = drawn[: 5 + len(found.left_out)]
    assert found.left_out == [where for where in looked_at if where in bad]
    assert found.left_out
    every = prepare_all(SampleSource(str(rows)), processor, 256, skip_bad_rows=True)
    assert (len(every.samples), every.left_out) == (5, bad)
    with pytest.raises(FourierError, match=r"no row can be used \(.*\)\. Mend the data"):
        prepare_all(source, processor, 5, skip_bad_rows=True)


def test_rows_left_out_are_told(rows, checkpoint, quick, tmp_path):
    source = SampleSource(str(rows))
    report = llava_fa.compress(checkpoint, tmp_path / "a", quick, source, skip_bad_rows=True)
    assert report.rows_left_out == ("rows.json row 2", "rows.json row 4", "rows.json row 5")
    good = [i for i in range(8) if i not in (2, 4, 5)]
    some = [(helpers.picture(i), f"what is {i}?", f"it is {i}") for i in good]
    assert llava_fa.compress(checkpoint, tmp_path / "b", quick, some).rows_left_out == ()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
