"""Training images, from sources through a prepared uint8 store to this rank's share of each global batch."""

from distgan.data.depth import Scale
from distgan.data.feed import Batch, Feed, parts, shares
from distgan.data.folders import refuse_among_pictures, refuse_mixing
from distgan.data.given import given
from distgan.data.records import numbered
from distgan.data.sources import find
from distgan.data.store import Images, load, preview, refuse_other_shapes, test_split

__all__ = [
    "Batch",
    "Feed",
    "Images",
    "Scale",
    "find",
    "given",
    "load",
    "numbered",
    "parts",
    "preview",
    "refuse_among_pictures",
    "refuse_mixing",
    "refuse_other_shapes",
    "shares",
    "test_split",
]
