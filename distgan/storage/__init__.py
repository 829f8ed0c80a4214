"""Checkpoints, exported generators, reports and the cache: the only package that reads or writes tensors."""
