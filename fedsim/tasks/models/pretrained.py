"""What a model starts from: the tensors of a safetensors file."""

import hashlib
import logging
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fedsim.basics.errors import ScenarioError, nearest
from fedsim.basics.home import expanded
from fedsim.basics.tensors import tensors_of

_log = logging.getLogger("fedsim")


class Pretrained:
    """Tensors read from a safetensors file.

    Args:
        path: The file.
        strict: Whether it must hold exactly the model's tensors.

    Attributes:
        sha256: Hash of the file.

    Raises:
        ScenarioError: If the file cannot be read or is none of safetensors.
    """

    def __init__(self, path: str, *, strict: bool = True) -> None:
        self._where, self._strict = f"[task] weights = '{path}'", strict
        try:
            content = expanded(path).read_bytes()
        except OSError as error:
            raise ScenarioError(f"{self._where}: cannot be read: {error.strerror}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tensors: dict[str, Tensor] = load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ScenarioError(
                f"{self._where}: is not a safetensors file, or a torn one: {error}"
            ) from error

    def put_into(self, model: nn.Module) -> dict[str, Any]:
        """Replace the model's tensors by those of the file, in place and in the model's dtypes.

        Returns:
            For the manifest: the file's hash, how many tensors were taken, and by name what the
            model kept of its own and what the file has besides.

        Raises:
            ScenarioError: If names or shapes do not fit; without `strict`, if nothing fits.
        """
        mine = tensors_of(model)
        missing = [name for name in mine if name not in self._tensors]
        unexpected = [name for name in self._tensors if name not in mine]
        misshapen = [
            name
            for name, tensor in mine.items()
            if name in self._tensors and not _fits(self._tensors[name], tensor)
        ]
        problems = [*(self._lack(name, unexpected) for name in missing)]
        problems += [f"has '{name}', which the model does not" for name in unexpected]
        problems += [self._shape(name, mine[name]) for name in misshapen]
        taken = [name for name in mine if name not in {*missing, *misshapen}]
        for name in taken:
            if not bool(torch.isfinite(self._tensors[name]).all()):
                raise ScenarioError(f"{self._where}: '{name}' holds NaN or infinity")
        if problems and self._strict:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise ScenarioError(
                f"{self._where}: {'; '.join(problems[:5])}{more}; with strict_weights = false "
                "what fits is taken"
            )
        if not taken:
            raise ScenarioError(
                f"{self._where}: no tensor fits the model: {'; '.join(problems[:5])}"
            )
        with torch.no_grad():
            for name in taken:
                mine[name].copy_(self._tensors[name])
        kept = [*missing, *misshapen]
        if kept or unexpected:
            _log.info("%s: the model keeps its own %s, unused: %s", self._where, kept, unexpected)
        return {"sha256": self.sha256, "taken": len(taken), "kept": kept, "unused": unexpected}

    def _lack(self, name: str, unexpected: list[str]) -> str:
        guess = nearest(name, unexpected)
        return f"lacks '{name}'" + (f" (nearest: '{guess}')" if guess else "")

    def _shape(self, name: str, tensor: Tensor) -> str:
        found = self._tensors[name]
        return (
            f"'{name}' is {found.dtype} of shape {tuple(found.shape)}, expected {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}"
        )


def _fits(found: Tensor, expected: Tensor) -> bool:
    """Whether one may stand for the other; only the width of floating-point numbers may differ."""
    alike = found.is_floating_point() == expected.is_floating_point()
    return found.shape == expected.shape and alike
