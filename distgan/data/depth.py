"""Decides which values of deep pictures (more than 8 bits) become 0 and 255, by one rule for a whole source.

    Integers (16 and 32 bits)    0 ... 2^b - 1, where b is the smallest of 8, 10, 12, 14, 16, 24 and 31 that holds the
                                 largest value of the source: 12-bit values in 16-bit files are 12-bit values
    Floats                       the first of 0 ... 1, -1 ... 1, 0 ... 255 and 0 ... 2^b - 1 (b 10, 12, 14 or 16) that
                                 holds all values of the source. Values may exceed the top by a tenth of it, and fall
                                 below 0 by a tenth of the source's largest value (below -1 by 0.1), because
                                 resampling overshoots; they are clipped.

Other values are refused. Pictures of 8 bits keep their values.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from distgan.errors import UserError

_DEPTHS = (8, 10, 12, 14, 16, 24, 31)
_FLOATS = ((0.0, 1.0), (-1.0, 1.0), *((0.0, 2.0**bits - 1) for bits in _DEPTHS[:5]))
_OVERSHOOT = 0.1

Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The values of one picture of more than 8 bits."""

    low: float
    high: float
    floats: bool
    cut: bool
    """Whether Pillow reads only the upper 8 of 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The values that become 0 and 255: for a source's integers and for its floats; None if it has none."""

    integers: Span | None = None
    floats: Span | None = None

    def __str__(self) -> str:
        spans = {"integers": self.integers, "floats": self.floats}
        return " and ".join(f"{kind} from {span[0]:g} to {span[1]:,.0f}" for kind, span in spans.items() if span)

    def or_else(self, other: "Scale") -> "Scale":
        """Returns this scale, with the other's ranges where this one has none."""
        return Scale(integers=self.integers or other.integers, floats=self.floats or other.floats)


def scale_of(extents: Iterable[tuple[str, Extent]]) -> Scale:
    """Returns the scale of a source, given the names and values of its deep pictures.

    Raises:
        UserError: no range holds the values, or Pillow would read 16-bit colours without the bits that they use.
    """
    named = list(extents)
    whole = [(name, extent) for name, extent in named if not extent.floats]
    floats = [(name, extent) for name, extent in named if extent.floats]
    return Scale(integers=_integers(whole) if whole else None, floats=_floats(floats) if floats else None)


def _integers(named: list[tuple[str, Extent]]) -> Span:
    name, lowest = min(named, key=lambda item: item[1].low)
    if lowest.low < 0:
        raise UserError(
            f"{name} has values down to {lowest.low:,.0f}, but a picture of integers must not go below 0: shift them."
        )
    high = max(extent.high for _, extent in named)
    bits = next(bits for bits in _DEPTHS if high < 2**bits)
    cut = next((name for name, extent in named if extent.cut), None)
    if cut is not None and bits < 16:
        raise UserError(
            f"{cut} has 16-bit colours that do not use the highest bits, but of its format Pillow reads only the upper "
            "8 bits: save such pictures as PNG, or with 8 bits."
        )
    return 0.0, 2.0**bits - 1


def _floats(named: list[tuple[str, Extent]]) -> Span:
    low_name, lowest = min(named, key=lambda item: item[1].low)
    high_name, highest = max(named, key=lambda item: item[1].high)
    for bottom, top in _FLOATS:
        below = _OVERSHOOT * (highest.high if bottom == 0 else top)
        if lowest.low >= bottom - below and highest.high <= top * (1 + _OVERSHOOT):
            return bottom, top
    raise UserError(
        f"the floats of these pictures go from {lowest.low:g} ({low_name}) to {highest.high:g} ({high_name}), but must "
        "lie in 0 ... 1, -1 ... 1, 0 ... 255 or 0 ... 65,535: rescale them."
    )
