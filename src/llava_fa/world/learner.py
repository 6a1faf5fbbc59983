"""The losses of one training step of the tiny LMM, its optimisers, and how well it does.

Three things make it learn in hours instead of days (docs/results.md has what was tried):

1. The vision tower is taught first, densely: every patch must name what it shows, *in the language model's own
   words*: the projected patch is scored against the tied word embeddings of colors, shapes, sizes and characters.
   The language model then finds pictures written in the vocabulary of the questions.
2. Then all of it is trained on packed questions (`llava_fa.world.packing`), the dense loss kept beside as an anchor.
3. Some heads are told what to look at (`llava_fa.world.looking`): finding the thing that a question names is learned in
   hundreds of steps instead of many thousands.

The hidden matrices are trained with Muon, everything else with AdamW; warm-up, constant rate, linear cool-down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_fa.hub.complete import loaded_model
from llava_fa.hub.source import resolve_model
from llava_fa.hub.visual_tokens import FIELD
from llava_fa.world.looking import LAYERS, looking_loss, watched
from llava_fa.world.model import build_model
from llava_fa.world.muon import Muon
from llava_fa.world.packing import IGNORED, TASK_NAMES, WorldBatches, attention_mask
from llava_fa.world.recipe import Recipe
from llava_fa.world.render import GRID
from llava_fa.world.vocabulary import dense_vocabulary

Batch = dict[str, torch.Tensor]

NOTHING_WEIGHT = {"color": 0.3, "shape": 0.3, "size": 0.3, "anchor": 0.1, "character": 0.05}
"""Weight of "nothing" patches in the dense loss: the rarer the thing, the less; what is shown weighs about half."""

GAIN_SCALE = 0.1
"""FMVR's gains, to which the loss is far more sensitive, learn so much slower than other parameters: at 1 to 5 they
wander, and the model is worse with them than without (docs/results.md)."""

NOT_HIDDEN = ("embed", ".mlp.gate.", "shared_expert_gate")
"""Parts of the names of matrices that AdamW trains as well: embeddings, and the routers of a mixture."""


class Learner:
    """Model, optimisers and the losses of one step."""

    def __init__(self, processor: LlavaProcessor, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device, self.processor = recipe, device, processor
        self.model = self.first_model().to(device)
        width = self.model.config.text_config.hidden_size
        self.center_head = torch.nn.Linear(width, 2).to(device)
        self.words = {
            name: torch.tensor(ids, device=device) for name, ids in dense_vocabulary(processor.tokenizer).items()
        }
        self.optimizers = self._optimizers()
        self.step = 0
        self.autocast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()

    def first_model(self) -> LlavaForConditionalGeneration:
        """What training starts from: a random model, or the one that the recipe goes on from."""
        if self.recipe.start is None:
            return build_model(self.processor.tokenizer, self.recipe.seed)
        return loaded_model(resolve_model(self.recipe.start), dtype=torch.float32)  # type: ignore[no-any-return]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        vision, matrices, rest = [], [], list(self.center_head.parameters())
        gains = []
        for name, parameter in self.model.named_parameters():
            if FIELD in name and parameter.ndim == 1:
                gains.append(parameter)
            elif parameter.ndim < 2 or any(part in name for part in NOT_HIDDEN):
                rest.append(parameter)
            else:
                (vision if "vision_tower" in name else matrices).append(parameter)
        # apart: gains' gradients are ten times those of all others together
        own = {id(parameter) for parameter in gains}
        self.clipped = [[p for p in self.model.parameters() if id(p) not in own], gains]
        groups = [{"params": matrices}, {"params": vision}]
        muon = Muon(groups, lr=self.recipe.muon_rate, weight_decay=self.recipe.weight_decay)
        adam_groups = [{"params": rest, "scale": 1.0}] + [{"params": gains, "scale": GAIN_SCALE}] * bool(gains)
        adam = torch.optim.AdamW(adam_groups, lr=self.recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        return [muon, adam]

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain types."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "center_head": self.center_head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.center_head.load_state_dict(state["center_head"])
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        rate = self.recipe.rate(self.step)
        muon, adam = self.optimizers
        language = self.step >= self.recipe.vision_steps
        scale, vision_scale = (self.recipe.language_scale, self.recipe.vision_scale) if language else (1.0, 1.0)
        for group, base in zip(muon.param_groups, (scale, vision_scale), strict=True):
            group["lr"] = rate * base * self.recipe.muon_rate
        for group in adam.param_groups:
            group["lr"] = rate * scale * group["scale"] * self.recipe.adam_rate
        self.model.train()
        self.model.model.vision_tower.requires_grad_(not self.frozen)
        losses = self.losses(batch)
        self.total(losses).backward()
        for parameters in self.clipped:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def total(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What is minimised."""
        dense = losses["dense"] * (1.0 if "answer" not in losses else self.recipe.dense_weight)
        looking = sum(loss for name, loss in losses.items() if name.startswith("looking"))
        return dense + losses.get("answer", 0.0) + self.recipe.looking_weight * looking

    @property
    def frozen(self) -> bool:
        """Whether the vision tower rests at this step."""
        return 0 <= self.step - self.recipe.vision_steps < self.recipe.frozen_steps

    def here(self, batch: Batch) -> Batch:
        """A batch on the model's device."""
        return {name: value.to(self.device) for name, value in batch.items()}

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The dense loss and, where the batch has questions, the answers' cross-entropy per token."""
        batch = self.here(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            patches = self._patches(batch["pixels"])
            losses = {"dense": self._dense_loss(patches.float(), batch)}
            if "ids" in batch:
                losses |= self._answer_losses(patches[: len(batch["ids"])], batch)
        return losses

    def _answer_losses(self, patches: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        losses = {}
        attentions = [self.model.model.language_model.layers[number].self_attn for number in LAYERS]
        with watched(attentions) as seen:
            hidden = self._answer_states(patches, batch)
        for index, (attention, note) in enumerate(zip(attentions, seen, strict=True)):
            losses[f"looking {LAYERS[index]}"] = looking_loss(
                attention, note, batch["look_from"][:, index], batch["look_to"][:, index]
            )
        wanted = batch["target"] != IGNORED
        logits = self.model.lm_head(hidden[wanted])
        total = functional.cross_entropy(logits.float(), batch["target"][wanted], reduction="sum")
        losses["answer"] = total / wanted.sum().clamp(min=1)  # a share of few pictures may have nothing to ask about
        return losses

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected patches [batch, 64, width], in the language model's embedding space."""
        values = (pixels.float() / 255 - 0.5) / 0.25  # what the processor does to a picture of the right size
        inner = self.model.model
        features = inner.vision_tower(values, output_hidden_states=True).hidden_states[-1][:, 1:]
        return inner.multi_modal_projector.forward(features)  # without the hook that reduces all pictures alike

    def _named(self, patches: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Normalised patches, and for each kind of word how well its words name them: logits [batch, 64, words]."""
        unit = functional.rms_norm(patches, patches.shape[-1:])
        embedding = self.model.get_input_embeddings().weight
        return unit, {name: unit @ embedding[ids].T for name, ids in self.words.items()}

    def _dense_loss(self, patches: torch.Tensor, batch: Batch) -> torch.Tensor:
        unit, words = self._named(patches)
        loss = unit.new_zeros(())
        for name, logits in words.items():
            weight = unit.new_ones(logits.shape[-1])
            weight[0] = NOTHING_WEIGHT[name]
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), batch[name].flatten(), weight)
        grid = (torch.arange(GRID, device=unit.device) + 0.5) / GRID
        own = torch.stack([grid.repeat(GRID), grid.repeat_interleave(GRID)], 1)
        where = torch.where(batch["anchor"][..., None] == 1, batch["center"], own)
        return loss + 10 * functional.mse_loss(self.center_head(unit).float(), where)

    def _answer_states(self, patches: torch.Tensor, batch: Batch) -> torch.Tensor:
        embeds = self.model.get_input_embeddings()(batch["ids"])
        count = patches.shape[1]
        embeds = torch.cat([embeds[:, :1], patches.to(embeds.dtype), embeds[:, 1 + count :]], 1)
        mask = attention_mask(batch["segment"]).to(embeds.dtype)
        out = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position"], use_cache=False
        )
        return out.last_hidden_state

    @torch.no_grad()
    def validate(self, batches: int) -> dict[str, float]:
        """Accuracy per task on validation scenes, and of the dense heads on patches that show something.

        An answer counts when every one of its tokens is the most likely one given those before it, which is exactly
        when greedy decoding would give it.
        """
        tally = torch.zeros(len(TASK_NAMES), 2)
        dense = {name: [0, 0] for name in self.words}
        for batch in self._validation(batches):
            patches = self._patches(batch["pixels"])
            for name, logits in self._named(patches)[1].items():
                shown = batch[name] > 0
                dense[name][0] += int((logits.argmax(-1) == batch[name])[shown].sum())
                dense[name][1] += int(shown.sum())
            if self.step > self.recipe.vision_steps:
                tally += self._tally(patches, batch)
        result = {f"patch {name}": hits / max(1, total) for name, (hits, total) in dense.items()}
        result |= {name: float(right / asked) for name, (right, asked) in zip(TASK_NAMES, tally, strict=True) if asked}
        return {name: round(value, 4) for name, value in result.items()}

    def _validation(self, batches: int) -> Iterator[Batch]:
        self.model.eval()
        data = WorldBatches(
            self.processor.tokenizer,
            split="validation",
            seed=0,
            batch=32,
            text=self.recipe.text_tokens,
            start=0,
            stop=batches,
        )
        return map(self.here, data)

    def _tally(self, patches: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[tasks, 2]: how many questions of every task are answered rightly, and how many there are."""
        tally = torch.zeros(len(TASK_NAMES), 2)
        guess = self.model.lm_head(self._answer_states(patches, batch)).argmax(-1)
        wrong = (batch["target"] != IGNORED) & (guess != batch["target"])
        for row in range(len(guess)):
            for number in range(1, int(batch["segment"][row].max()) + 1):
                inside = batch["segment"][row] == number
                task = int(batch["task"][row][inside][0])
                tally[task] += torch.tensor([not bool(wrong[row][inside].any()), 1])
        return tally
