"""What the name of a module says of it, in transformers' naming."""

from __future__ import annotations


def is_query_or_key(name: str) -> bool:
    """Whether a layer is the query or the key projection of an attention module."""
    return name.rpartition(".")[2] in ("q_proj", "k_proj")


def is_vision(name: str) -> bool:
    """Whether a module belongs to a vision tower (of a vision-language model in transformers' naming)."""
    return any(part.startswith(("vision", "visual")) for part in name.split("."))
