"""The k largest of many scores, exactly, in little memory: radix select on the bits of float32 numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from salun.errors import MaskError

_HALF = 1 << 16  # values of half a float's bits; also the entries in a chunk


@dataclass(frozen=True)
class Selection:
    """The selected entries and their threshold.

    bits: name → packed bits (`numpy.packbits`, little). threshold: the smallest selected score. zeros: fraction of all
    scores that are 0. ties: fraction of all scores equal to the threshold (of these the earlier ones are selected).
    """

    bits: dict[str, np.ndarray]
    threshold: float
    zeros: float
    ties: float

    def warnings(self) -> list[str]:
        """What a user should know: many zeros or ties make part of the selection arbitrary."""
        warnings = []
        if self.zeros > 0.01:
            warnings.append(f"{self.zeros:.1%} of the weights have no gradient at all")
        if self.ties > 0.01:
            warnings.append(f"{self.ties:.1%} of the scores are tied at the threshold; the earlier ones were selected")
        return warnings


def select_largest(scores: Mapping[str, Tensor], k: int) -> Selection:
    """The k largest scores over all tensors together; ties go to the earlier tensor, then the earlier index.

    scores: float32, not negative, any shapes and devices. The k-th largest value is found by radix select on the bits
    of the floats (which sort like the numbers) in two passes over 16-bit halves; extra memory is a few chunks of
    65,536 entries, besides the mask itself. Raises MaskError for k out of range or a score that is NaN or negative.
    """
    flat, total = _flatten(scores), sum(s.numel() for s in scores.values())
    bit_pattern, above, tied = _kth(flat, k, total)
    packed = _pack_selected(flat, bit_pattern, k - above)
    zeros = sum(len(s) - int(torch.count_nonzero(s)) for s in flat.values())
    return Selection(packed, _as_float(bit_pattern), zeros / total, tied / total)


def select_largest_each(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Selection:
    """The largest scores of each tensor by itself, `counts[name]` of them; ties go to the earlier index.

    The selection's threshold is the smallest of the tensors' own; its ties are the scores equal to their tensor's.
    """
    bits, thresholds, zeros, tied, total = {}, [], 0.0, 0.0, sum(s.numel() for s in scores.values())
    for name, of in scores.items():
        if not counts[name]:
            bits[name] = np.zeros((of.numel() + 7) // 8, np.uint8)
            zeros += of.numel() - int(torch.count_nonzero(of))
            continue
        each = select_largest({name: of}, counts[name])
        bits[name] = each.bits[name]
        thresholds.append(each.threshold)
        zeros += each.zeros * of.numel()
        tied += each.ties * of.numel()
    if not thresholds:
        raise MaskError(f"0 entries cannot be selected out of {total}")
    return Selection(bits, min(thresholds), zeros / total, tied / total)


def kth_largest(scores: Mapping[str, Tensor], k: int) -> float:
    """The k-th largest (1-based) of all scores together; as `select_largest`, without making a mask."""
    return _as_float(_kth(_flatten(scores), k, sum(s.numel() for s in scores.values()))[0])


def _flatten(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: s.detach().reshape(-1).float() for name, s in scores.items()}


def _as_float(bit_pattern: int) -> float:
    return float(np.array([bit_pattern], np.uint32).view(np.float32)[0])


def _kth(flat: Mapping[str, Tensor], k: int, total: int) -> tuple[int, int, int]:
    """Bit pattern of the k-th largest score, how many lie above it, and how many equal it."""
    if not 0 < k <= total:
        raise MaskError(f"{k} entries cannot be selected out of {total}")
    high = np.zeros(_HALF, np.int64)
    for bits in _chunks(flat):
        high += np.bincount(bits >> 16, minlength=_HALF)
    if high[0x7F80:].sum():  # infinities, NaN, and every number with the sign bit set
        raise MaskError("scores must be finite and not negative")
    upper, above = _kth_from_top(high, k)
    low = np.zeros(_HALF, np.int64)
    for bits in _chunks(flat):
        low += np.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=_HALF)
    lower, above_low = _kth_from_top(low, k - above)
    return (upper << 16) | lower, above + above_low, int(low[lower])


def _chunks(flat: Mapping[str, Tensor]) -> Iterator[np.ndarray]:
    """Bit patterns of the scores as uint32 arrays of at most 65,536 entries."""
    for scores in flat.values():
        for chunk in scores.split(_HALF):
            yield chunk.cpu().numpy().view(np.uint32)


def _kth_from_top(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest entry (1-based), and how many entries lie in the bins above it."""
    from_top = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(from_top, k))
    bin_index = len(histogram) - 1 - position
    return bin_index, int(from_top[position] - histogram[bin_index])


def _pack_selected(flat: Mapping[str, Tensor], bit_pattern: int, ties: int) -> dict[str, np.ndarray]:
    packed = {}
    for name, scores in flat.items():
        row = np.empty((len(scores) + 7) // 8, np.uint8)
        for start, bits in zip(range(0, len(scores), _HALF), _chunks({name: scores}), strict=True):
            selected = bits > bit_pattern
            if ties:
                tied = np.flatnonzero(bits == bit_pattern)[:ties]
                selected[tied] = True
                ties -= len(tied)
            row[start // 8 : start // 8 + (len(bits) + 7) // 8] = np.packbits(selected, bitorder="little")
        packed[name] = row
    return packed
