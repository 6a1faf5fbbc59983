"""Paths through a trellis, from the definition: what tests of the search and of the feedback share."""

from __future__ import annotations

import itertools

import torch


def decode(code, states):
    """Points of windows [T, m] → [2 T, m], coefficient by coefficient."""
    return torch.cat([code.points[window].T for window in states.long()])


def overlap(states, code):
    """Whether every window is the one before, shifted by k bits."""
    return torch.equal(states[1:] & (code.groups - 1), states[:-1] >> code.code_bits)


def bit_strings(steps, code_bits, state_bits):
    """Windows [2^bits, steps] of all strings of steps·k + L - k bits, from the definition."""
    bits = steps * code_bits + state_bits - code_bits
    strings = torch.tensor(list(itertools.product((0, 1), repeat=bits)))
    weight = 2 ** torch.arange(state_bits)
    return torch.stack([(strings[:, t * code_bits :][:, :state_bits] * weight).sum(1) for t in range(steps)], dim=1)
