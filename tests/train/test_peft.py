"""LoRA by peft on top of packed layers."""

import helpers
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_fa.errors import FourierError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def test_lora_on_top_of_a_compressed_model(compressed, tmp_path):
    from llava_fa.train.lora import with_lora

    start = LlavaForConditionalGeneration.from_pretrained(compressed)
    inputs = dict(helpers.inputs_for(helpers.processor()))
    before = logits(start, inputs)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = with_lora(start, config)
    assert torch.equal(logits(model, inputs), before)  # it begins with nothing
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = logits(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = LlavaForConditionalGeneration.from_pretrained(compressed)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(loaded, inputs), after)


def test_what_cannot_be_is_refused(compressed):
    from llava_fa.train.lora import with_lora

    start = LlavaForConditionalGeneration.from_pretrained(compressed)
    with pytest.raises(FourierError, match="changes the weight below the adapter"):
        with_lora(start, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))


def test_the_trainer_trains_an_adapter_and_resumes(compressed, tmp_path):
    from transformers import Trainer, TrainingArguments

    from llava_fa.train.lora import with_lora

    inputs = helpers.inputs_for(helpers.processor())
    row = {name: value[0] for name, value in inputs.items()} | {"labels": inputs["input_ids"][0]}

    def run(steps, resume=None):
        model = LlavaForConditionalGeneration.from_pretrained(compressed)
        model = with_lora(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        settings = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(model, settings, train_dataset=[row] * 4)
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    trained, _ = run(2)
    again = LlavaForConditionalGeneration.from_pretrained(compressed)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "checkpoint-2")
    assert torch.equal(logits(loaded, inputs), logits(trained, inputs))
    _, trainer = run(3, str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3
