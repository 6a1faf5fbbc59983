"""Tokenizer, image processor and chat template of a checkpoint in LLaVA's first format (`hub.original`)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_fa.errors import FourierError, explained
from llava_fa.hub.architecture import one_line, quiet_transformers
from llava_fa.hub.shards import write_text
from llava_fa.hub.source import read_object

IMAGE, VIDEO, PAD = "<image>", "<video>", "<pad>"
_TOKENIZER = "tokenizer_config.json"
_WRITTEN_ANEW = (
    _TOKENIZER,
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files of a folder that saving a processor replaces, or leaves behind in an older form."""
_PIXELS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)
_TOLD = (
    "{%- macro told(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part.type == 'image' -%}{{ IMAGE + '\\n' }}{%- endfor -%}"
    "{%- for part in content if part.type == 'video' -%}{{ VIDEO + '\\n' }}{%- endfor -%}"
    "{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)
"""Pictures first, as LLaVA was trained; IMAGE, VIDEO and END stand for tokens."""
_VICUNA = (
    "{%- if messages[0].role != 'system' -%}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}"
    "{{ 'The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ told(message.content) + ' ' }}"
    "{%- elif message.role == 'user' -%}{{ 'USER: ' + told(message.content) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + told(message.content) + END }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
_INSTRUCT = (
    "{%- set ns = namespace(system='') -%}{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{%- set ns.system = told(message.content) + '\\n' -%}"
    "{%- elif message.role == 'user' -%}{{ '[INST] ' + ns.system + told(message.content) + ' [/INST]' }}"
    "{%- set ns.system = '' -%}"
    "{%- else -%}{{ ' ' + told(message.content) + ' ' + END }}{%- endif -%}{%- endfor -%}"
)
_CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + told(message.content) + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


_LLAMA_3 = (
    "{%- if messages[0].role != 'system' -%}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nYou are a helpful language and vision assistant. ' }}"
    "{{ 'You are able to understand the visual content that the user provides, ' }}"
    "{{ 'and assist the user with a variety of tasks using natural language.<|eot_id|>' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + told(message.content) + '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)


@dataclasses.dataclass(frozen=True)
class Words:
    """Tokens of a processor: how many, and which are what."""

    count: int
    image: int
    video: int | None
    pad: int


def copy_beside(files: list[Path], folder: Path, home: Path) -> None:
    """Copy what lies beside the weights of ``folder``; code for a format that is left behind stays there."""
    for path in files:
        if path.suffix != ".py":
            target = home / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    if not (home / _TOKENIZER).is_file():
        return
    import transformers

    settings = read_object(home / _TOKENIZER)
    settings.pop("auto_map", None)
    if not hasattr(transformers, str(settings.get("tokenizer_class"))):  # InternLM-2's is a program of its own
        fast = (home / "tokenizer.json").is_file()
        settings["tokenizer_class"] = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    write_text(home / _TOKENIZER, json.dumps(settings, indent=2) + "\n")


def write_processor(
    home: Path, values: Mapping[str, Any], config: Any, rows: int, tower: Path, language: str, where: str
) -> Words:
    """Replace the tokenizer in ``home`` by the processor of transformers' class, pictures and chat template included.

    Args:
        home: holds config.json and the tokenizer.
        values: LLaVA's config.json.
        config: transformers' of the whole.
        rows: of the word embedding as it is stored.
        tower: folder of the vision tower, whose image processor it is.
        language: as `hub.original.Original` has it.
        where: what errors call the folder.

    Raises:
        FourierError: there is no tokenizer, or one of another vocabulary; no image processor.
    """
    from transformers import AutoTokenizer

    remedy = "The folder needs the files of its tokenizer; to read tokenizer.model alone, `pip install sentencepiece`"
    loading = explained("its tokenizer cannot be loaded", remedy=remedy, where=where, words=one_line)
    with quiet_transformers(), loading:
        tokenizer: Any = AutoTokenizer.from_pretrained(home, padding_side="left", trust_remote_code=False)
    if (count := len(tokenizer)) > rows:
        raise FourierError(
            f"its tokenizer has {count} tokens, and the word embedding {rows} rows",
            remedy="Give the tokenizer that this model was trained with",
            where=where,
        )
    videos = config.model_type == "llava_onevision"
    words = _with_tokens(tokenizer, videos)
    settings = _settings(config, _pixels(tower, home, where), pad=values.get("image_aspect_ratio") == "pad")
    for file in _WRITTEN_ANEW:
        (home / file).unlink(missing_ok=True)
    with quiet_transformers():
        tokenizer.chat_template = None
        tokenizer.save_pretrained(home)
    write_text(home / "processor_config.json", json.dumps(settings, indent=2) + "\n")
    template = chat_template(tokenizer, language, bool(values.get("mm_use_im_start_end")))
    write_text(home / "chat_template.jinja", template)
    return words


def _settings(config: Any, pixels: dict[str, Any], pad: bool) -> dict[str, Any]:
    """processor_config.json of transformers' class for this configuration.

    Written rather than made by the class: LLaVA-OneVision's needs torchvision, if only for videos.
    """
    name, vision = config.architectures[0].removesuffix("ForConditionalGeneration"), config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    made: dict[str, Any] = {
        "processor_class": f"{name}Processor",
        "image_token": IMAGE,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if name == "LlavaOnevision":
        pixels = {key: value for key, value in pixels.items() if "crop" not in key}
        made |= {
            "video_token": VIDEO,
            "num_image_tokens": patches,
            "vision_aspect_ratio": config.vision_aspect_ratio,
            "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor", **pixels},
        }
    else:  # the class token is one more than the patches
        clip = vision.model_type == "clip_vision_model"
        made |= {"patch_size": vision.patch_size, "num_additional_image_tokens": int(clip)}
    more = {"do_pad": pad} if name == "Llava" else {"image_grid_pinpoints": config.image_grid_pinpoints}
    return {**made, "image_processor": {"image_processor_type": f"{name}ImageProcessor", **pixels, **more}}


def _with_tokens(tokenizer: Any, video: bool) -> Words:
    """Add the tokens that stand for pictures, and one for padding where there is none of its own."""
    from transformers import AddedToken

    for token in (IMAGE, VIDEO)[: 1 + video]:
        tokenizer.add_tokens(AddedToken(token, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.unk_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": PAD})
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, VIDEO)]
    return Words(len(tokenizer), ids[0], ids[1] if video else None, tokenizer.pad_token_id)


def _pixels(tower: Path, home: Path, where: str) -> dict[str, Any]:
    """How pictures become numbers: by the vision tower's own image processor, or one beside the model."""
    from transformers import AutoImageProcessor

    names = ("preprocessor_config.json", "processor_config.json")
    for folder in (tower, home):
        if any((folder / name).is_file() for name in names):
            what = "the image processor of its vision tower cannot be loaded"
            remedy = "Copy or download preprocessor_config.json again"
            with quiet_transformers(), explained(what, remedy=remedy, where=str(folder), words=one_line):
                found = json.loads(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False).to_json_string())
            pixels = {key: found[key] for key in _PIXELS if found.get(key) is not None}
            return {"do_center_crop": False, **pixels}
    raise FourierError(
        f"there is no preprocessor_config.json, neither in the vision tower's folder ({tower}) nor beside the model",
        remedy="Copy or download the vision tower again",
        where=where,
    )


def chat_template(tokenizer: Any, language: str, marked: bool = False) -> str:
    """How conversations were written down in training, as a Jinja template that takes pictures.

    LLaVA chooses among its own by the model's name; here the tokenizer says it: one with ``<|im_start|>`` was trained
    on ChatML, one with ``<|start_header_id|>`` as Llama 3, Mistral on ``[INST]``, the others as Vicuna.

    Args:
        tokenizer: of the model.
        language: as `hub.original.Original` has it.
        marked: whether pictures stand between ``<im_start>`` and ``<im_end>``.
    """
    form = _INSTRUCT if language == "mistral" else _VICUNA
    words = tokenizer.get_vocab()
    if "<|start_header_id|>" in words:
        form = _LLAMA_3
    elif "<|im_start|>" in words:
        form = _CHATML
        if language == "qwen2":
            form = (
                "{%- if messages[0].role != 'system' -%}"
                "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}" + form
            )
    image = f"<im_start>{IMAGE}<im_end>" if marked else IMAGE
    tokens = {"IMAGE": image, "VIDEO": VIDEO, "END": tokenizer.eos_token or ""}
    return "".join(f"{{%- set {key} = {json.dumps(token)} -%}}" for key, token in tokens.items()) + _TOLD + form
