"""Seeded damage to the files of a model's folder: what disks, downloads, scripts and strangers do to them."""

from __future__ import annotations

import json
import random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, "", "x", "a" * 3000,
    "NaN", [], {}, [[]], [None], {"": None}, "../up", "/etc/passwd", "F32", "BF16", "F8_E4M3", "U8", "BOOL", "llava_fa",
    "best",
]  # fmt: skip


def damage(random_: random.Random, files: dict[str, bytes]) -> dict[str, bytes]:
    """Copies of the files, one of them damaged in one way, now and then in a few."""
    out = dict(files)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        name = random_.choice(sorted(out))
        out[name] = _file(random_, name, out[name])
    if random_.random() < 0.02:
        del out[random_.choice(sorted(out))]
    if random_.random() < 0.02:
        one, other = random_.choice(sorted(files)), random_.choice(sorted(files))
        out[one] = files[other]
    return out


def _file(random_: random.Random, name: str, data: bytes) -> bytes:
    if random_.random() < 0.5:
        return damaged_bytes(random_, data)
    if name.endswith(".json"):
        return _json(random_, data)
    return damaged_header(random_, data)


def damaged_bytes(random_: random.Random, data: bytes) -> bytes:
    """Bits flipped, or bytes cut off, added, left out, doubled, zeroed, exchanged."""
    if not data:
        return b"\0"
    begin = random_.randrange(min(len(data), random_.choice((8, 64, 4096, len(data)))))
    end = min(len(data), begin + random_.choice((1, 1, 2, 8, 100, 5000)))
    piece = data[begin:end]
    ways = (
        data[:begin] + bytes([data[begin] ^ (1 << random_.randrange(8))]) + data[begin + 1 :],
        data[:begin],
        data + random_.randbytes(random_.choice((1, 8, 100))),
        data[:begin] + data[end:],
        data[:begin] + piece + data[begin:],
        data[:begin] + bytes(len(piece)) + data[end:],
        data[:begin] + random_.randbytes(len(piece)) + data[end:],
        data[:begin] + piece[::-1] + data[end:],
    )
    return random_.choice(ways)


def _json(random_: random.Random, data: bytes) -> bytes:
    try:
        return json.dumps(damaged_tree(random_, json.loads(data))).encode()
    except (ValueError, RecursionError):
        return damaged_bytes(random_, data)


def damaged_header(random_: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, of the length that it says, and the bytes behind it as they were."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        return damaged_bytes(random_, data)
    header = _json(random_, data[8 : 8 + length])
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damaged_tree(random_: random.Random, tree: Any) -> Any:
    """JSON with one value replaced, left out, doubled, renamed, wrapped, or exchanged for another."""
    places = list(_places(tree))
    if not places:
        return random_.choice(ODD)
    at, key = random_.choice(places)
    way = random_.randrange(7)
    if way == 0:
        at[key] = random_.choice(ODD)
    elif way == 1:
        del at[key]
    elif way == 2 and isinstance(at, dict):
        at[f"{key}{random_.choice(('', ' ', 'x', '.weight'))}2"] = at[key]
    elif way == 3 and isinstance(at, dict):
        at[str(random_.choice(places)[1])] = at.pop(key)
    elif way == 4:
        at[key] = [at[key]]
    elif way == 5 and isinstance(at[key], (int, float)):
        at[key] = random_.choice((at[key] + 1, at[key] - 1, 2 * at[key], -at[key], at[key] * 10**9, float(at[key])))
    else:
        other, place = random_.choice(places)
        value = other[place] if _holds(other, place) else None
        at[key] = json.loads(json.dumps(value))  # a copy: trees have no loops
    return tree


def _places(tree: Any) -> Any:
    """Every (container, key) of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _holds(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)
