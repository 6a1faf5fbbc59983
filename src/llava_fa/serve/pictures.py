"""Pictures of a request: where they may come from, and how large they may be.

transformers opens whatever string it is given: a path, any URL with its redirects, any format that Pillow knows. Here
every picture is brought to bytes under the server's rules, looked at, and handed on as a data URL.
"""

from __future__ import annotations

import base64
import binascii
import io
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from llava_fa.data.pictures import seen_otherwise
from llava_fa.serve.errors import ApiError
from llava_fa.serve.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Decoders that strangers' bytes may reach."""
FETCH_SECONDS = 20.0


@dataclass(frozen=True)
class Sources:
    """Where pictures may come from besides data URLs: nowhere by default.

    Attributes:
        hosts: names of hosts from which http(s) URLs are fetched. Redirects are not followed, so a URL leads nowhere
            else; what a name resolves to is its owner's business.
        folder: the folder below which ``file://`` URLs are read; symbolic links do not lead out of it.
    """

    hosts: Sequence[str] = ()
    folder: Path | None = None


class Pictures:
    """The pictures of one request, counted together."""

    def __init__(self, limits: Limits, sources: Sources) -> None:
        self.limits, self.sources = limits, sources
        self.count = self.pixels = 0

    def admit(self, url: object, param: str) -> str:
        """The picture as a data URL that decodes within the limits, and that transformers decodes to what it shows.

        It goes on as it came, turned by its EXIF there; what transformers would clip or fail on (16-bit greyscale,
        EXIF that cannot be written anew) is handed on as it is to be seen.

        Args:
            url: what the request gives: ``data:``, ``http(s)://`` or ``file://``.
            param: its place in the request, for errors.

        Raises:
            ApiError: 400, what it is or where it lies is not accepted, or it is no picture; 413, it is too large.
        """
        try:
            data = self._bytes(url)
            image = self.look(data)
        except ApiError as error:
            error.param = param
            raise
        if (picture := seen_otherwise(image)) is not None:
            return _png(picture)
        kind = "jpeg" if image.format in ("JPEG", "MPO") else str(image.format).lower()
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    def _bytes(self, url: object) -> bytes:
        if not isinstance(url, str):
            raise ApiError(400, "image_url.url is not a string", code="invalid_image")
        self.count += 1
        if self.count > self.limits.images:
            raise ApiError(400, f"More than {self.limits.images} images", code="too_many_images")
        scheme = url.split(":", 1)[0].lower() if ":" in url[:16] else ""
        ways = {"data": self._decoded, "http": self._fetched, "https": self._fetched, "file": self._read}
        if scheme not in ways:
            raise ApiError(400, "An image is given as a data URL: data:image/png;base64,…", code="invalid_image_url")
        return ways[scheme](url)

    def _decoded(self, url: str) -> bytes:
        head, comma, content = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError(400, "The data URL is not base64", code="invalid_image_url")
        if len(content) * 3 // 4 > self.limits.image_bytes + 2:
            raise self._too_large()
        try:
            raw = unquote_to_bytes(content) if "%" in content else content.encode()
            return base64.b64decode(b"".join(raw.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(400, "The data URL is not valid base64", code="invalid_image_url") from None

    def _fetched(self, url: str) -> bytes:
        refused = ApiError(
            400, "This server does not fetch images from there; send a data URL", code="remote_image_refused"
        )
        if not self.sources.hosts:
            raise refused
        import httpx

        try:
            address = httpx.URL(url)  # read once: the host that is checked is the one that is asked
        except httpx.InvalidURL:
            raise refused from None
        if address.host.lower() not in {name.lower() for name in self.sources.hosts}:
            raise refused
        failed = ApiError(400, "The image could not be fetched", code="image_not_fetched")
        data, end = bytearray(), time.monotonic() + FETCH_SECONDS
        try:
            # trust_env: neither a proxy nor .netrc of the server's account may speak for a stranger's request
            with (
                httpx.Client(timeout=FETCH_SECONDS, trust_env=False, follow_redirects=False) as client,
                client.stream("GET", address, headers={"accept-encoding": "identity"}) as reply,
            ):
                if reply.status_code != 200:
                    raise failed
                for part in reply.iter_raw():
                    data += part
                    if len(data) > self.limits.image_bytes:
                        raise self._too_large()
                    if time.monotonic() > end:
                        raise failed
        except httpx.HTTPError:
            raise failed from None
        return bytes(data)

    def _read(self, url: str) -> bytes:
        refused = ApiError(400, "This server does not read that file; send a data URL", code="file_refused")
        folder = self.sources.folder
        parts = urlsplit(url)
        if folder is None or parts.netloc not in ("", "localhost"):
            raise refused
        try:
            path = Path(unquote_to_bytes(parts.path).decode()).resolve(strict=True)
            if not path.is_relative_to(folder.resolve()) or not path.is_file():
                raise refused
            with path.open("rb") as file:
                return file.read(self.limits.image_bytes + 1)
        except (OSError, ValueError):  # whether a file outside exists is nobody's business: one error for all
            raise refused from None

    def look(self, data: bytes) -> Image.Image:
        """The decoded picture in these bytes; its size is read before any pixel is.

        Raises:
            ApiError: 400, it is no picture; 413, it is too large.
        """
        if len(data) > self.limits.image_bytes:
            raise self._too_large()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is the one that counts
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    self.pixels += image.width * image.height
                    if self.pixels > self.limits.pixels:
                        most = self.limits.pixels
                        raise ApiError(413, f"The images have more than {most} pixels", code="image_too_large")
                    image.load()
                    return image
        except Image.DecompressionBombError:
            raise ApiError(413, "The image has too many pixels", code="image_too_large") from None
        except (OSError, SyntaxError, ValueError, EOFError):
            message = f"This is not a readable image ({', '.join(FORMATS)})"
            raise ApiError(400, message, code="invalid_image") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"An image has more than {self.limits.image_bytes} bytes", code="image_too_large")


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
