"""How good a generator is: formulas over features of its images and of real ones."""

from distgan.metrics.scores import ClassSums, Moments, frechet, kid, prdc

__all__ = ["ClassSums", "Moments", "frechet", "kid", "prdc"]
