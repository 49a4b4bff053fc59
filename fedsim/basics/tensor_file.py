"""Writing safetensors files from tensors that may be larger than main memory.

safetensors' own writer makes the whole file in memory, or goes through a file with a name of its
own, which stays behind when the process is killed. Files are read with safetensors.
"""

import json
from collections.abc import Mapping
from typing import IO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors as a safetensors file, one after another.

    Args:
        file: Where to.
        tensors: By name, on the CPU, of dtypes in `DTYPES`.
        metadata: Texts for the file's header.

    Raises:
        KeyError: If the format does not have a tensor's dtype.
        OSError: If the disk does not take it.
    """
    # numbers that are longer come first, so that each lies at a multiple of its length
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, first = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(tensor_bytes(tensors[name]))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's numbers in C order as bytes; of a contiguous one nothing is copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not len(flat):
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data
