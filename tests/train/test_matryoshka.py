"""The loss over all scales: which tokens stay, what is learnt, what is saved."""

import json

import helpers
import pytest
import torch
from tiled_models import next_model, onevision_count, onevision_model
from typer.testing import CliRunner

import llava_fa
from llava_fa.cli.main import app
from llava_fa.data.rows import Rows
from llava_fa.hub.loading import load
from llava_fa.hub.visual_tokens import attach_visual_tokens, set_visual_tokens, visual_tokens_of
from llava_fa.train.data import Collator, Conversations
from llava_fa.train.loss import ModelTeacher, RecoveryLoss, answers
from llava_fa.train.matryoshka import MatryoshkaLoss, matryoshka, without_image_tokens
from llava_fa.train.recover import recover
from llava_fa.train.settings import TrainingSettings


def sample(processor, pictures, **options):
    text = "<image>" * len(pictures) + " what is it? a thing"
    inputs = dict(processor(images=[pictures], text=[text], return_tensors="pt", **options))
    inputs["labels"] = torch.where(torch.arange(inputs["input_ids"].shape[1]) >= inputs["input_ids"].shape[1] - 5,
                                   inputs["input_ids"], -100)  # fmt: skip
    return inputs


def test_the_first_tokens_of_every_picture_stay():
    ids = torch.tensor([[5, 1, 1, 1, 1, 6, 1, 1, 1, 1, 7], [5, 1, 1, 1, 1, 6, 8, 9, 0, 0, 0]])
    inputs = {
        "input_ids": ids,
        "labels": torch.where(ids > 5, ids, -100),
        "attention_mask": torch.tensor([[1] * 11, [1] * 8 + [0] * 3]),
        "position_ids": torch.arange(11).expand(2, -1),
        "pixel_values": torch.zeros(3),
    }
    found = without_image_tokens(inputs, 1, [4, 4, 4], [1, 1, 1])
    assert found["input_ids"].tolist() == [[5, 1, 6, 1, 7, 0, 0, 0], [5, 1, 6, 8, 9, 0, 0, 0]]
    assert found["labels"].tolist() == [[-100, -100, 6, -100, 7] + [-100] * 3, [-100, -100, 6, 8, 9] + [-100] * 3]
    assert found["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 5 + [0] * 3]
    assert found["position_ids"][:, :5].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert found["pixel_values"] is inputs["pixel_values"]
    with pytest.raises(llava_fa.FourierError, match="12 image tokens, its pictures give 8"):
        without_image_tokens(inputs, 1, [4, 4], [1, 1])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("count", [4, 1])
def test_a_shortened_batch_is_what_the_processor_makes(family, count):
    model, processor = next_model() if family == "llava_next" else (helpers.random_llava(), helpers.processor())
    attach_visual_tokens(model, processor)
    picture = helpers.picture(size=150).crop((0, 0, 150, 90))
    full = sample(processor, [picture])
    loss = MatryoshkaLoss(RecoveryLoss(None, cross_entropy=1.0), model)
    short = loss.at(full, count)
    set_visual_tokens(model, count, processor)
    want = sample(processor, [picture])
    assert torch.equal(short["input_ids"], want["input_ids"])
    assert torch.equal(short["labels"], want["labels"])
    with torch.no_grad():
        torch.testing.assert_close(answers(model, short)[0], answers(model, want)[0])


def test_onevision_pictures_are_counted():
    model = attach_visual_tokens(onevision_model())
    loss = MatryoshkaLoss(RecoveryLoss(None), model)
    sizes = torch.tensor([[126, 50], [40, 200]])
    for count in (81, 25, 9, 1):
        assert loss._lengths({"image_sizes": sizes}, count) == [
            onevision_count(model, count, *size) for size in sizes.tolist()
        ]
    many = {"image_sizes": sizes, "batch_num_images": torch.tensor([2])}
    assert loss._lengths(many, 9) == [10, 10]  # several pictures: one tile and a newline each


def test_the_loss_is_the_mean_over_scales_and_restores_the_model():
    model, processor = helpers.random_llava(), helpers.processor()
    attach_visual_tokens(model, processor)
    inputs = sample(processor, [helpers.picture()])
    plain = RecoveryLoss(None, cross_entropy=1.0)
    loss = MatryoshkaLoss(plain, model)
    found = loss(model, inputs)
    each = [plain(model, loss.at(inputs, count))["loss"] for count in (16, 4, 1)]
    torch.testing.assert_close(found["loss"], torch.stack(each).mean())
    loss.at(inputs, 16)
    assert visual_tokens_of(model).tokens == 16
    assert {"cross_entropy, 16 tokens", "cross_entropy, 4 tokens", "cross_entropy, 1 tokens"} < set(found)


def test_hidden_states_are_matched_with_all_tokens_only():
    (model, processor), teacher = (helpers.random_llava(), helpers.processor()), helpers.random_llava(seed=1)
    attach_visual_tokens(model, processor)
    inputs = sample(processor, [helpers.picture()])
    plain = RecoveryLoss(ModelTeacher(teacher), hidden=1.0)
    loss = MatryoshkaLoss(plain, model)
    found, full = loss(model, inputs), plain(model, inputs)
    torch.testing.assert_close(found["hidden"], full["hidden"] / 3)
    assert found["divergence"] > 0


def test_rows_without_a_picture():
    model, processor = helpers.random_llava(), helpers.processor()
    attach_visual_tokens(model, processor)
    inputs = dict(processor.tokenizer("what is a thing?", return_tensors="pt"))
    inputs["labels"] = inputs["input_ids"]
    plain = RecoveryLoss(None, cross_entropy=1.0)
    torch.testing.assert_close(MatryoshkaLoss(plain, model)(model, inputs)["loss"], plain(model, inputs)["loss"])


def test_packed_questions_of_the_world_keep_to_themselves():
    from llava_fa.world.packed import PackedWorld

    model, processor = load("tiny", "cpu", torch.float32)
    attach_visual_tokens(model)
    world = PackedWorld(processor, pictures=2, text=60)
    items = [world[i] for i in range(2)]
    batch = Collator(0)(items)
    loss = MatryoshkaLoss(RecoveryLoss(None, cross_entropy=1.0), model)
    with torch.no_grad():
        together = loss(model, batch)
        alone = [loss(model, Collator(0)([item])) for item in items]
    sizes = [int((item["labels"] != -100).sum()) for item in items]
    for name in together:
        mean = sum(n * float(one[name]) for n, one in zip(sizes, alone, strict=True)) / sum(sizes)
        assert float(together[name]) == pytest.approx(mean, rel=1e-4)


SETTINGS = TrainingSettings(steps=2, batch=2, save_every=2, log_every=1, rate=3e-2, parts=("visual_tokens",))


def test_its_own_parameters_only_on_a_compressed_model(tmp_path, compressed, original, rows):
    def data(processor, most):
        return Conversations(Rows(str(rows)), processor, max_length=most)

    # a model that was saved with fewer tokens is trained with all of them too
    llava_fa.compress(original, tmp_path / "small", llava_fa.FourierConfig(bits=2), visual_tokens=4)
    start = tmp_path / "small"
    found = recover(start, tmp_path / "out", settings=SETTINGS, teacher=original, **matryoshka(start, data))
    assert found.by_part == {"visual_tokens": 2 * 8 * 48}
    model, processor = load(tmp_path / "out", "cpu", torch.float32)
    module = visual_tokens_of(model)
    assert (module.kind, module.tokens, processor.patch_size) == ("fmvr", 16, 7)
    assert (module.restoration[0].maximum.low != 0).any()
    now, before = model.state_dict(), load(compressed, "cpu", torch.float32)[0].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in now.items() if name in before)


def test_the_command(tmp_path, compressed, rows):
    arguments = ("--data", rows, "--matryoshka", "--steps", 1, "--batch", 2, "--json")
    result = CliRunner().invoke(app, ["train", *map(str, (compressed, tmp_path / "out", *arguments))])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["by_part"]["visual_tokens"] == 2 * 8 * 48


def test_compressed_and_trained_back_in_one_command(tmp_path, original, rows):
    out, asked = tmp_path / "out", ("--bits", 2, "--calibration", rows, "--visual-tokens", 4, "--recover", 1)
    asked += ("--embeddings", 4)
    first = CliRunner().invoke(app, ["compress", *map(str, (original, out, *asked, "--json"))])
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert told["training"]["steps"] == 1
    assert {layer["rank"] for layer in told["layers"] if not layer["embedding"]} == {1}
    assert [layer["rank"] for layer in told["layers"] if layer["embedding"]] == [0]
    model, processor = load(out, "cpu", torch.float32)
    assert (visual_tokens_of(model).tokens, processor.patch_size) == (4, 14)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    plain = CliRunner().invoke(app, ["compress", str(original), str(tmp_path / "b"), "--recover", "1"])
    assert plain.exit_code == 2
    assert "goes with --calibration" in plain.output


def test_mistakes_are_named(tmp_path):
    with pytest.raises(llava_fa.FourierError, match="no elastic visual tokens"):
        MatryoshkaLoss(RecoveryLoss(None), helpers.random_llava())
    model = attach_visual_tokens(helpers.random_llava(), kind="fmvr")
    helpers.save_llava(tmp_path, model=model)
    with pytest.raises(llava_fa.FourierError, match="kind fmvr"):
        matryoshka(tmp_path, None, "pooling")
