"""Packing equals asking alone; the optimiser does what it says; a killed run resumes to the same weights."""

import json

import pytest
import torch

from llava_fa.errors import FourierError
from llava_fa.world import training
from llava_fa.world.learner import Learner
from llava_fa.world.model import build_model, build_processor
from llava_fa.world.muon import Muon, orthogonalise
from llava_fa.world.packing import IGNORED, PREFIX, WorldBatches, attention_mask
from llava_fa.world.recipe import Recipe
from llava_fa.world.training import train
from llava_fa.world.vocabulary import IMAGE, dense_vocabulary

TINY = Recipe(
    vision_steps=2,
    language_steps=3,
    cooldown_steps=2,
    frozen_steps=1,
    vision_batch=2,
    language_batch=2,
    wordy_batch=1,
    text_tokens=48,
)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def batches(processor, **changes):
    settings = {"split": "train", "seed": 0, "batch": 2, "text": 96, "start": 0, "stop": 2, **changes}
    return WorldBatches(processor.tokenizer, **settings)


def test_words_of_the_dense_supervision_are_single_tokens(processor):
    words = dense_vocabulary(processor.tokenizer)
    assert {name: len(ids) for name, ids in words.items()} == {
        "color": 9,
        "shape": 12,
        "size": 3,
        "anchor": 2,
        "character": 38,
    }


def test_a_packed_question_sees_what_it_would_see_alone(processor):
    """Logits of every packed question equal those of the whole model on that question by itself."""
    torch.manual_seed(0)
    learner = Learner(processor, TINY, torch.device("cpu"))
    model = learner.model.eval()
    batch = batches(processor, batch=1)[0]
    with torch.no_grad():
        packed = model.lm_head(learner._answer_states(learner._patches(batch["pixels"]), batch))[0]
        segment = batch["segment"][0]
        for number in range(1, int(segment.max()) + 1):
            inside = segment == number
            ids = torch.cat([batch["ids"][0, :PREFIX], batch["ids"][0, inside]])[None]
            pixels = (batch["pixels"].float() / 255 - 0.5) / 0.25
            alone = model(input_ids=ids, pixel_values=pixels).logits[0, PREFIX:]
            torch.testing.assert_close(packed[inside], alone, atol=2e-4, rtol=2e-4)
        assert number >= 4


def test_packed_tokens_are_the_processors_own(processor):
    """What training shows is what the chat template and the processor make of the same question."""
    data = batches(processor, batch=1)
    row = {name: value[0] for name, value in data[0].items()}
    inside = row["segment"] == 1
    answer = row["target"][inside]
    answer = answer[answer != IGNORED]
    asked = row["ids"][inside][: int(inside.sum()) - len(answer)]
    text = processor.tokenizer.decode(asked[:-1])
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], add_generation_prompt=True
    )
    from PIL import Image

    inputs = processor(images=Image.new("RGB", (96, 96)), text=prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [*row["ids"][:PREFIX].tolist(), *asked.tolist()]
    assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE)).sum() == 64


def test_the_processor_leaves_the_pixels_alone(processor):
    from PIL import Image

    data = batches(processor, batch=1, text=0)[0]
    picture = Image.fromarray(data["pixels"][0].permute(1, 2, 0).numpy())
    values = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, (data["pixels"].float() / 255 - 0.5) / 0.25, atol=1e-5, rtol=0)


def test_wordy_pictures_come_on_top_and_are_read_in_training_only(processor):
    batch = batches(processor, wordy=3)[0]
    assert len(batch["pixels"]) == len(batch["character"]) == 5
    assert len(batch["ids"]) == 2
    plain = batches(processor)[0]
    assert torch.equal(batch["pixels"][:2], plain["pixels"])
    assert (batch["character"][2:] > 0).sum() > 2 * (plain["character"] > 0).sum() / 2


def test_padding_sees_something_and_teaches_nothing(processor):
    batch = batches(processor, text=200)[0]
    padding = batch["segment"] == -1
    assert padding.any()
    assert (batch["target"][padding] == IGNORED).all()
    assert torch.isfinite(attention_mask(batch["segment"]).amax(-1)).all()


def test_orthogonalise_brings_singular_values_near_one():
    for shape in ((3, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_muon_lowers_a_quadratic_and_batches_shapes_exactly():
    torch.manual_seed(0)
    target = [torch.randn(6, 4), torch.randn(6, 4)]
    together = [torch.nn.Parameter(torch.zeros(6, 4)) for _ in target]
    alone = [torch.nn.Parameter(torch.zeros(6, 4)) for _ in target]
    optimizers = [Muon(together, lr=0.05), *(Muon([p], lr=0.05) for p in alone)]
    for _ in range(60):
        for parameters in (together, alone):
            loss = sum(((p - t) ** 2).sum() for p, t in zip(parameters, target, strict=True))
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b, t in zip(together, alone, target, strict=True):
        torch.testing.assert_close(a, b)
        assert (a - t).norm() < 0.25 * t.norm()


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    settings = {"workers": 0, "save_every": 1, "check_every": 3, "check_batches": 1}
    whole = train(tmp_path / "whole", TINY, **settings)

    class StopError(Exception):
        pass

    def stop_at(step):
        def report(row):
            if row["step"] == step:
                raise StopError

        return report

    with pytest.raises(StopError):
        train(tmp_path / "parts", TINY, report=stop_at(3), **settings)
    # the words keep their numbers whatever vocabulary a later package brings
    monkeypatch.setattr(training, "build_processor", lambda: pytest.fail("a resumed run builds no tokenizer"))
    resumed = train(tmp_path / "parts", TINY, **settings)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert json.loads((tmp_path / "parts" / "model" / "config.json").read_text())["model_type"] == "llava"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_state(tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "update", lambda self, batch: {"dense": float("nan")})
    with pytest.raises(FourierError, match="not finite at step 0"):
        train(tmp_path, TINY, workers=0)
    assert not (tmp_path / "state.pt").exists()


def test_the_model_is_the_size_it_says(processor):
    model = build_model(processor.tokenizer)
    count = sum(p.numel() for p in model.parameters())
    assert 5e6 < count < 12e6
    assert 2 * count < 24e6
