"""Data sets that tests make."""

import gzip
import struct


def idx_folder(folder, pictures, labels, name="train"):
    """IDX files as MNIST's and Fashion-MNIST's, of grey pictures (N, H, W)."""
    folder.mkdir(parents=True, exist_ok=True)
    images = b"\0\0\x08\x03" + struct.pack(">3I", *pictures.shape) + pictures.tobytes()
    targets = b"\0\0\x08\x01" + struct.pack(">I", len(labels)) + bytes(labels)
    (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(targets))
    return folder
