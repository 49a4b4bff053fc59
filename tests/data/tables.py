"""Tiny data sets for tests, written as their originals are."""

import io

import datasets
import numpy as np
from PIL import Image

from fedsim.data.preparation import prepare

IID = {"kind": "iid", "clients": 4}


def png(pixels):
    """Encode `[height, width]` or `[height, width, 3]`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count, seed, shape=(28, 28)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path, columns, types):
    """Write a parquet file with the types that `datasets` stores beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = {
        name: [{"bytes": png(v), "path": None} for v in values]
        if types[name] == "image"
        else values
        for name, values in columns.items()
    }
    features = datasets.Features(
        {
            name: datasets.Image()
            if kind == "image"
            else datasets.ClassLabel(names=kind)
            if isinstance(kind, list)
            else datasets.Value(kind)
            for name, kind in types.items()
        }
    )
    datasets.Dataset.from_dict(encoded, features).to_parquet(path)


def load(cache_dir, partition=IID, *, seed=0, **data):
    return prepare(data, partition, seed=seed, cache_dir=cache_dir)
