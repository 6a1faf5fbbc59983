"""How much one request, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llava_fa.bounds import COUNT, MOST_BYTES, MOST_SECONDS, real, whole


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients can make the server hold and do.

    Attributes:
        body_bytes: of a request.
        image_bytes: of one picture, as encoded.
        pixels: of all pictures of a request together, decoded: three bytes of memory each, and more in the processor.
        images: pictures in a request.
        text_characters: of all messages together; tokenising is linear in them.
        tokens: longest answer; a request that asks for more gets so many, and ``finish_reason`` says ``length``.
        seconds: from a request's first byte to the last one of its answer, waiting included.
        requests: at a time, waiting ones included; the next one gets status 429.

    Raises:
        FourierError: one of them is below 1, or so large that it limits nothing.
    """

    body_bytes: int = 32 * 2**20
    image_bytes: int = 10 * 2**20
    pixels: int = 25_000_000
    images: int = 16
    text_characters: int = 200_000
    tokens: int = 1024
    seconds: float = 300.0
    requests: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = f"the limit {field.name}", getattr(self, field.name)
            if field.name == "seconds":
                real(name, value, 1, MOST_SECONDS)
            else:
                whole(name, value, 1, MOST_BYTES if field.name.endswith("bytes") else COUNT)
