"""What makes a model's inputs of text and pictures: transformers' processor, or a tokenizer in the place of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_fa.errors import FourierError, explained
from llava_fa.hub.architecture import one_line, quiet_transformers, reads_text_alone


class TextProcessor:
    """The tokenizer of a model that reads text alone, to be called as a processor is.

    In chat messages it takes the text and leaves out what else there is; given a picture itself, it refuses.

    Args:
        tokenizer: the model's; attributes that are not here are its.
        chat_template: where the tokenizer's is not the one.
    """

    image_token = ""
    """What stands for a picture in a text: nothing."""

    def __init__(self, tokenizer: Any, chat_template: Any = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not there yet: being copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """The tokens of a text.

        Raises:
            FourierError: there are pictures.
        """
        if images:
            raise FourierError("this model does not see pictures", remedy="Leave them out, or take another model")
        from transformers import BatchFeature

        return BatchFeature(self.tokenizer(text, **options).data)

    def apply_chat_template(self, conversation: Sequence[Any], *, tokenize: bool = False, **options: Any) -> Any:
        """The conversation as the template has it, its messages reduced to their text."""
        if conversation and isinstance(conversation[0], Mapping):
            conversation = [_text_alone(message) for message in conversation]
        else:
            conversation = [[_text_alone(message) for message in one] for one in conversation]
        options.setdefault("chat_template", self.chat_template)
        return self.tokenizer.apply_chat_template(conversation, tokenize=tokenize, **options)


def _text_alone(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return dict(message)
    return {**message, "content": "\n".join(_texts(content))}


def _texts(content: Sequence[Any]) -> Iterator[str]:
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            yield part["text"]


def sees_pictures(processor: Any) -> bool:
    """Whether this processor takes pictures."""
    return not isinstance(processor, TextProcessor) and getattr(processor, "image_processor", None) is not None


def pictures_for(processor: Any, pictures: Sequence[Any]) -> list[Any] | None:
    """What of a sample's pictures a processor is given: none where the model reads text alone, or there are none."""
    return list(pictures) or None if sees_pictures(processor) else None


def load_processor(folder: Path, where: str = "") -> Any:
    """The model's processor, tokenizer, image processor and chat template in one; of a text model a `TextProcessor`.

    Args:
        folder: that holds its files.
        where: what errors call it.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    where = where or str(folder)
    remedy = "The folder needs the tokenizer and preprocessor files of the model"
    loading = explained("its processor cannot be loaded", remedy=remedy, where=where, words=one_line)
    with quiet_transformers(), loading:
        # the tokenizer of a language model that was part of another may still name the processor of the whole
        alone = reads_text_alone(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        processor = (AutoTokenizer if alone else AutoProcessor).from_pretrained(folder, trust_remote_code=False)
    if sees_pictures(processor):
        return processor
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise FourierError("it has no tokenizer", remedy=remedy, where=where)
    return TextProcessor(tokenizer, getattr(processor, "chat_template", None))


def check_chat_template(processor: Any, model: str | Path) -> None:
    """`FourierError` if the processor of this model cannot write a question down."""
    if not getattr(processor, "chat_template", None):
        raise FourierError("its processor has no chat template", remedy="Add chat_template.jinja", where=str(model))


def check_sees(processor: Any, model: str | Path) -> None:
    """`FourierError` if this model's processor takes no pictures."""
    if not sees_pictures(processor):
        raise FourierError("this model does not see pictures", remedy="Give a vision-language model", where=str(model))
