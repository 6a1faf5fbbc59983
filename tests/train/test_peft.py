"""LoRA by peft on top of packed layers."""

import helpers
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_fa.nn.factored_linear import packed_layers

peft = pytest.importorskip("peft")


def test_lora_on_top_of_a_compressed_model(compressed, tmp_path):
    from llava_fa.train.lora import with_lora

    start = LlavaForConditionalGeneration.from_pretrained(compressed)
    inputs = dict(helpers.inputs_for(helpers.processor()))
    before = start(**inputs).logits
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = with_lora(start, config)
    torch.testing.assert_close(model(**inputs).logits, before)  # it begins with nothing
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
    after = model(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    again = LlavaForConditionalGeneration.from_pretrained(compressed)
    codes = dict(packed_layers(again))
    loaded = with_lora(again, config)
    peft.set_peft_model_state_dict(loaded, peft.load_peft_weights(str(tmp_path / "adapter")))
    torch.testing.assert_close(loaded(**inputs).logits, after)
    assert len(codes) > 10
