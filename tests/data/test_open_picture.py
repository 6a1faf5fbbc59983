"""One way in for pictures: upright, 8 bits, first frame; and what cannot be opened is named, shortly."""

import base64
import io
import struct
import warnings
import zlib

import helpers
import numpy as np
import pytest
from PIL import Image, ImageOps

from llava_fa import FourierError
from llava_fa.data.pictures import film_frames, from_base64, open_picture, seen_otherwise

SCENE = helpers.picture(3, 24).resize((24, 16))
ORIENTATION = 0x0112


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(value, kind="PNG"):
    """The scene as a camera held otherwise stores it."""
    exif = Image.Exif()
    exif[ORIENTATION] = value
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 5: Image.Transpose.TRANSPOSE}
    back |= {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    back |= {7: Image.Transpose.TRANSVERSE}
    stored = SCENE.transpose(back[value]) if value in back else SCENE
    return encoded(stored, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("value", range(1, 9))
def test_pictures_are_upright(tmp_path, kind, value):
    data = with_orientation(value, kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    found = open_picture(path)
    assert found.size == SCENE.size
    if kind in ("PNG", "TIFF"):
        assert found.tobytes() == SCENE.tobytes()
    pillows = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")  # what transformers does
    assert found.tobytes() == pillows.tobytes()
    with Image.open(path) as opened:
        for given in (str(path), data, bytearray(data), opened, {"bytes": data, "path": None}, {"path": str(path)}):
            again = open_picture(given)
            assert again.tobytes() == found.tobytes()
            assert open_picture(again).tobytes() == found.tobytes(), "turned twice"


def test_damaged_exif_does_not_stop_a_picture():
    """Some of it Pillow reads and cannot write, on which its own exif_transpose fails."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F], exif[0x011A] = 6, "maker", 1.5
    whole = bytearray(encoded(SCENE, exif=exif))
    start, found = whole.index(b"eXIf") + 4, set()
    for place in range(start, start + 60):
        for value in (0, 1, 255):
            data = bytearray(whole)
            data[place] = value
            length = struct.unpack(">I", data[start - 8 : start - 4])[0]
            data[start + length : start + length + 4] = struct.pack(">I", zlib.crc32(data[start - 4 : start + length]))
            picture = open_picture(bytes(data))
            assert picture.size in (SCENE.size, SCENE.size[::-1])
            found.add((picture.size, _pillow_fails(data)))
    assert {fails for _, fails in found} == {False, True}
    assert {size for size, _ in found} == {SCENE.size, SCENE.size[::-1]}


def _pillow_fails(data):
    first, second = (Image.open(io.BytesIO(data)) for _ in range(2))  # what failed once may pass the second time
    first.load()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ImageOps.exif_transpose(second)
    except Exception:
        assert seen_otherwise(first).tobytes() == open_picture(bytes(data)).tobytes()
        return True
    assert seen_otherwise(first) is None
    return False


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
"""Every value that 8 bits have."""


def sixteen(kind):
    """The ramp in 16 bits, with the lower 8 bits at random."""
    noise = np.random.default_rng(0).integers(0, 256, RAMP.shape)
    values = RAMP.astype(np.uint16) * 256 + noise.astype(np.uint16)
    if kind == "PGM":
        return b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
    if kind == "I;16B":
        return Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes())
    image = Image.fromarray(values)
    return image if kind == "memory" else encoded(image, kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM", "memory", "I;16B"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    picture = open_picture(sixteen(kind))
    assert picture.mode == "RGB"
    assert (np.asarray(picture) == RAMP[..., None]).all()


def test_sixteen_bits_of_a_dark_picture_stay_dark():
    values = np.full((4, 4), 200, dtype=np.uint16)  # of 65535
    data = b"P5 4 4 65535\n" + values.astype(">u2").tobytes()
    for given in (data, encoded(Image.fromarray(values))):
        assert np.asarray(open_picture(given)).max() == 0


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 256, RAMP),
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.float32) / 255, RAMP),
        (RAMP.astype(np.float32) * 1000 - 7, RAMP),
        (RAMP.astype(np.int32) * -100_000, 255 - RAMP),
        (np.full((3, 3), 1e9, dtype=np.float32), np.zeros((3, 3))),
    ],
)
def test_modes_without_a_range(values, seen):
    assert (np.asarray(open_picture(Image.fromarray(values))) == seen[..., None]).all()


def test_what_is_not_finite_is_black():
    values = RAMP.astype(np.float32) / 255
    values[0, 5], values[3, 3], values[2, 2] = np.nan, np.inf, -np.inf
    found = np.asarray(open_picture(Image.fromarray(values)))[..., 0]
    assert found[0, 5] == found[3, 3] == found[2, 2] == 0
    assert (found == RAMP).sum() == RAMP.size - 3


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "1", "HSV"])
def test_other_modes_are_as_pillow_converts_them(mode):
    image = SCENE.convert("LA").convert("PA") if mode == "PA" else SCENE.convert(mode)
    assert open_picture(image).tobytes() == image.convert("RGB").tobytes()


def test_a_palette_with_transparency_gives_no_warning(tmp_path):
    image = SCENE.quantize(16)
    data = encoded(image, transparency=bytes(range(16)))
    assert open_picture(data).tobytes() == image.convert("RGB").tobytes()


def film(kind):
    frames = [helpers.picture(seed, 12) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True), frames


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_and_chosen_ones(tmp_path, kind):
    data, frames = film(kind)
    path = tmp_path / "film"
    path.write_bytes(data)
    shown = film_frames(path, lambda total: range(total))
    assert len(shown) == 3
    assert open_picture(data).tobytes() == shown[0].tobytes()
    if kind != "GIF":
        assert [one.tobytes() for one in shown] == [one.tobytes() for one in frames]
    with pytest.raises(FourierError, match=r"row 1: image .*gone does not exist"):
        film_frames(tmp_path / "gone", lambda total: [0], "row 1")


def bomb(side):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


BAD = {
    "no picture": (b"this is no picture", r"cannot be read \(UnidentifiedImageError"),
    "nothing": (b"", "cannot be read"),
    "a PNG cut short": (encoded(SCENE)[:300], "cannot be read"),
    "a JPEG cut short": (encoded(helpers.picture(0, 200), "JPEG")[:900], "cannot be read"),
    "a bomb": (bomb(20_000), "more pixels than Pillow decodes"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_pictures_that_cannot_be_opened(tmp_path, data, message):
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(FourierError, match=rf"row 7: image .*picture\.png .*{message}\w*"):
        open_picture(path, "row 7")
    with pytest.raises(FourierError, match=rf"row 7: the picture of {len(data)} bytes .*{message}"):
        open_picture({"bytes": data, "path": "picture.png"}, "row 7")


def test_no_error_repeats_a_picture(tmp_path):
    text = base64.b64encode(encoded(helpers.picture(0, 200))).decode()
    for given in (text, text.encode(), {"bytes": text.encode(), "path": text}, {"path": text}, [text], 7, None):
        with pytest.raises(FourierError) as caught:
            open_picture(given, "row 7")
        assert len(str(caught.value)) < 400
        assert str(caught.value).startswith("row 7: ")
    with pytest.raises(FourierError, match="is no picture in base64") as caught:
        from_base64(text[:-2] + "!", "row 7")
    assert len(str(caught.value)) < 400
    with pytest.raises(FourierError, match=r"image .* cannot be read \(IsADirectoryError: Is a directory\)"):
        open_picture(tmp_path)


def test_base64_may_be_wrapped():
    data = encoded(SCENE)
    assert from_base64(base64.encodebytes(data).decode()) == data
