"""Distributed GAN training with the same updates on any number of processes and exact resume.

>>> generator = distgan.load_generator("runs/quickstart")
>>> images = generator.sample(64, seed=1)  # uint8 (64, C, H, W)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_generator"]

if TYPE_CHECKING:
    from distgan.storage.exported import load_generator


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for: `distgan --help` must stay quick."""
    if name == "load_generator":
        from distgan.storage.exported import load_generator

        return load_generator
    raise AttributeError(f"module 'distgan' has no attribute {name!r}")
