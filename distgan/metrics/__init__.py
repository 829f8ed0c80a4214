"""How good a generator is: extractors of features, and formulas over features of its images and of real ones."""

from distgan.metrics.extractors import Classifier, Extractor, Inception
from distgan.metrics.scores import ClassSums, Moments, frechet, kid, prdc, spread

__all__ = ["ClassSums", "Classifier", "Extractor", "Inception", "Moments", "frechet", "kid", "prdc", "spread"]
