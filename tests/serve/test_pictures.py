"""Where a request's pictures may come from, and how large they may be."""

import base64
import io
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from llava_fa.data.pictures import open_picture
from llava_fa.serve.errors import ApiError
from llava_fa.serve.limits import Limits
from llava_fa.serve.pictures import Pictures, Sources

NOWHERE = Sources()


def encoded(kind="PNG", size=(40, 30), colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def admit(url, limits=None, sources=NOWHERE):
    return Pictures(limits or Limits(), sources).admit(url, "here")


def decoded(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def refused(url, limits=None, sources=NOWHERE):
    with pytest.raises(ApiError) as caught:
        admit(url, limits, sources)
    assert caught.value.param == "here"
    return caught.value.status, caught.value.code


def bomb(width, height):
    """A PNG of a hundred bytes that says it has so many pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_comes_through_whatever_its_label(kind):
    url = admit(data_url(encoded(kind), "application/octet-stream"))
    assert url.startswith(f"data:image/{kind.lower()};base64,")
    assert decoded(url).size == (40, 30)


def test_escaped_and_wrapped_base64_is_read():
    content = base64.encodebytes(encoded(size=(200, 200))).decode()
    assert "\n" in content
    assert decoded(admit("data:image/png;base64," + content)).size == (200, 200)
    assert decoded(admit("data:image/png;base64," + quote(content))).size == (200, 200)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png,plain", "invalid_image_url"),
        ("data:image/png;base64,!!!!", "invalid_image_url"),
        (data_url(b"no picture"), "invalid_image"),
        (data_url(encoded()[:60]), "invalid_image"),
        (data_url(encoded("TIFF")), "invalid_image"),  # a decoder that strangers do not reach
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "invalid_image"),
        ("/etc/passwd", "invalid_image_url"),
        ("ftp://example.org/a.png", "invalid_image_url"),
        ("iVBORw0KGgo=", "invalid_image_url"),
        (None, "invalid_image"),
        ({"url": "x"}, "invalid_image"),
        ("file:///etc/passwd", "file_refused"),
        ("http://169.254.169.254/latest/meta-data", "remote_image_refused"),
        ("HTTPS://example.org/a.png", "remote_image_refused"),
        ("http://[::1", "remote_image_refused"),
    ],
)
def test_what_is_no_picture_or_lies_elsewhere_is_refused(url, code):
    assert refused(url) == (400, code)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    for width, height in ((5001, 5000), (10000, 10000), (60000, 60000)):  # beyond ours, Pillow's warning, its error
        assert refused(data_url(bomb(width, height))) == (413, "image_too_large")


def test_pixels_are_those_of_all_pictures_together_and_pictures_are_counted():
    pictures = Pictures(Limits(pixels=2 * 40 * 30, images=3), NOWHERE)
    for _ in range(2):
        pictures.admit(data_url(encoded()), "here")
    with pytest.raises(ApiError, match="more than 2400 pixels"):
        pictures.admit(data_url(encoded()), "here")
    with pytest.raises(ApiError, match="More than 3 images"):
        pictures.admit(data_url(encoded()), "here")


def test_bytes_are_limited_exactly():
    data = encoded()
    assert admit(data_url(data), Limits(image_bytes=len(data)))
    for most in (len(data) - 1, 10):
        assert refused(data_url(data), Limits(image_bytes=most)) == (413, "image_too_large")


def test_files_only_below_the_folder(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    for path in (folder / "a b.png", tmp_path / "secret.png"):
        path.write_bytes(encoded())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    allowed = Sources(folder=folder)
    assert decoded(admit(f"file://{quote(str(folder))}/a%20b.png", sources=allowed)).size == (40, 30)
    for path in ("link.png", "../secret.png", "%2e%2e/secret.png", "none.png", "", "a%00b.png"):
        assert refused(f"file://{folder}/{path}", sources=allowed) == (400, "file_refused")
    assert refused(f"file://elsewhere{folder}/a%20b.png", sources=allowed) == (400, "file_refused")
    small = Limits(image_bytes=10)
    assert refused(f"file://{folder}/a%20b.png", small, allowed) == (413, "image_too_large")


@pytest.fixture(scope="module")
def web():
    """A web server of this machine: its address, and the paths that were asked for."""
    pytest.importorskip("httpx", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            if moved:
                self.send_header("location", "/picture")
            self.end_headers()
            self.wfile.write(encoded() + (b"\0" * 10**5 if self.path == "/long" else b""))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_urls_only_of_named_hosts_and_no_redirects(web):
    address, asked = web
    allowed = Sources(hosts=["127.0.0.1"])
    assert decoded(admit(f"{address}/picture", sources=allowed)).size == (40, 30)
    assert asked == ["/picture"]
    assert refused(f"{address}/moved", sources=allowed) == (400, "image_not_fetched")
    assert asked == ["/picture", "/moved"]
    assert refused(f"{address}/long", Limits(image_bytes=1000), allowed) == (413, "image_too_large")
    assert refused("http://127.0.0.1:9/none", sources=allowed) == (400, "image_not_fetched")
    before = list(asked)
    port = address.rpartition(":")[2]
    for place in ("localhost", "127.0.0.1@localhost", "127.0.0.1:80@localhost", "127.0.0.1.localhost"):
        assert refused(f"http://{place}:{port}/picture", sources=allowed) == (400, "remote_image_refused")
    assert refused(f"{address}/picture", sources=Sources(hosts=["example.org"])) == (400, "remote_image_refused")
    assert asked == before


def oriented(value, **more):
    exif = Image.Exif()
    exif[0x0112] = value
    for tag, content in more.items():
        exif[int(tag[1:])] = content
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def damaged():
    """EXIF in which the camera's maker is a fraction: Pillow reads that, and its exif_transpose cannot write it."""
    data = bytearray(oriented(6, _282=1.5))
    start = data.index(b"eXIf")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    order = ">H" if data[start + 4 : start + 6] == b"MM" else "<H"
    entry = data.index(struct.pack(order, 282), start)
    data[entry : entry + 2] = struct.pack(order, 271)
    data[start + 4 + length : start + 8 + length] = struct.pack(">I", zlib.crc32(data[start : start + 4 + length]))
    return bytes(data)


def deep():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("data", [oriented(1), oriented(6), oriented(3), damaged(), deep(), encoded("GIF")])
def test_transformers_sees_what_all_others_see(data):
    """Upright, and of 8 bits: what a calibration, a benchmark and `llava-fa chat` make of the same file."""
    from transformers.image_utils import load_image

    seen = load_image(admit(data_url(data)))
    assert seen.tobytes() == open_picture(data).tobytes()
    assert seen.size == open_picture(data).size


def test_damaged_exif_is_more_than_transformers_takes():
    """Why such a picture is not handed on as it comes."""
    from transformers.image_utils import load_image

    with pytest.raises(AttributeError):
        load_image(data_url(damaged()))
    assert open_picture(damaged()).size == (30, 40)
