"""Peers from their own libraries."""

from __future__ import annotations

from stagewise import Rounder


class Absent(Exception):  # noqa: N818
    """A library that is not installed, or refuses to work here."""


LIBRARIES: list[tuple[str, str, float, bool, Rounder]] = []
