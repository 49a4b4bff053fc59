"""How a model's named tensors lie in one flat vector, and payloads of them. Needs torch alone."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

BATCHNORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


Rows = Tensor | list[Tensor]  # flat vectors, `[n, dim]`, or one by one


class TensorSpec(NamedTuple):
    """Name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Layout:
    """The named tensors of a model: trainable ones in one flat vector, buffers beside it.

    Attributes:
        names: Every tensor's name, in the model's own order (torch's `state_dict` order).
        trainable: The tensors that are trained, in that order; they make the flat vector.
        buffers: Everything else (BatchNorm statistics, frozen parameters), each in its own dtype.
    """

    names: tuple[str, ...]
    trainable: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]

    @classmethod
    def from_model(cls, model: nn.Module) -> "Layout":
        """Read the layout off a module: parameters with `requires_grad` are trainable.

        Raises:
            ValueError: If there are none.
        """
        parameters = dict(model.named_parameters())
        named = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
            and (name in parameters or not _is_alias(tensor, parameters))
        }
        trained = {name for name, tensor in named.items() if tensor.requires_grad}
        if not trained:
            raise ValueError("the model has no trainable tensor")
        return cls.from_named(named, buffers=named.keys() - trained)

    @classmethod
    def from_named(
        cls, named: Mapping[str, Tensor], buffers: Iterable[str] | None = None
    ) -> "Layout":
        """Build a layout from named tensors.

        Args:
            named: Tensors by name, in model order.
            buffers: Names that are not trained; None takes integer tensors and those with a name of
                torch's BatchNorm statistics (a bare record of arrays does not say more).

        Raises:
            ValueError: If a buffer's name is not among the tensors.
        """
        if buffers is None:
            fixed = {
                name
                for name, tensor in named.items()
                if not tensor.is_floating_point() or name.rpartition(".")[2] in BATCHNORM_BUFFERS
            }
        else:
            fixed = set(buffers)
            missing = sorted(fixed - named.keys())
            if missing:
                raise ValueError(f"buffers {missing} are not among the tensors {list(named)}")
        specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in named.items()]
        trainable = tuple(spec for spec in specs if spec.name not in fixed)
        return cls(tuple(named), trainable, tuple(spec for spec in specs if spec.name in fixed))

    def without(self, names: Collection[str]) -> "Layout":
        """Return the layout of the same model without some of its tensors.

        What is left may hold no trainable tensor: its flat vector is empty then.
        """
        if not names:
            return self
        return Layout(
            tuple(name for name in self.names if name not in names),
            tuple(spec for spec in self.trainable if spec.name not in names),
            tuple(spec for spec in self.buffers if spec.name not in names),
        )

    @cached_property
    def dim(self) -> int:
        """Length of the flat vector."""
        return sum(spec.size for spec in self.trainable)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The flat vector's dtype: the widest among the trainable tensors; float32 of none."""
        if not self.trainable:
            return torch.float32
        dtype = self.trainable[0].dtype
        for spec in self.trainable:
            dtype = torch.promote_types(dtype, spec.dtype)
        return dtype

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each trainable tensor lies in the flat vector."""
        places, start = {}, 0
        for spec in self.trainable:
            places[spec.name] = slice(start, start + spec.size)
            start += spec.size
        return places

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, shapes and dtypes, which both sides of the wire must share."""
        text = repr((self.names, self.trainable, self.buffers))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def flatten(self, named: Mapping[str, Tensor], *, rows: Sequence[int] | None = None) -> Tensor:
        """Copy trainable tensors `[*lead, *shape]` into one `[*lead, dim]`.

        Args:
            named: All trainable tensors, sharing their leading dimensions.
            rows: Of tensors `[n, *shape]`, which to take and in which order; None takes all.
        """
        if not self.trainable:
            return torch.empty((0,) if rows is None else (len(rows), 0), dtype=self.dtype)
        first = named[self.trainable[0].name]
        lead = first.shape[: first.dim() - len(self.trainable[0].shape)]
        if rows is not None:
            lead = torch.Size([len(rows)])
        flat = torch.empty((*lead, self.dim), dtype=self.dtype, device=first.device)
        self.write(named, flat, rows=rows)
        return flat

    def write(
        self, named: Mapping[str, Tensor], out: Rows, *, rows: Sequence[int] | None = None
    ) -> None:
        """Copy trainable tensors `[*lead, *shape]` to where their flat vectors shall be.

        Args:
            named: As for `flatten`.
            out: `[*lead, dim]`, or the rows of a `[n, dim]` one by one.
            rows: As for `flatten`.
        """
        for spec in self.trainable:
            tensor, span = named[spec.name], self.slices[spec.name]
            if isinstance(out, Tensor) and rows is None:
                part = out[..., span]
                part.copy_(tensor.reshape(part.shape))
                continue
            # picked together they would be copied twice
            for place, row in enumerate(range(len(out)) if rows is None else rows):
                out[place][span] = tensor[row].reshape(-1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views `[*lead, *shape]` of a flat `[*lead, dim]` by name, in their dtypes."""
        lead = flat.shape[:-1]
        return {
            spec.name: flat[..., self.slices[spec.name]]
            .reshape((*lead, *spec.shape))
            .to(spec.dtype)
            for spec in self.trainable
        }

    def flat_behind(self, named: Mapping[str, Tensor]) -> Tensor | None:
        """Return the flat `[n, dim]` whose views by name these tensors are, or None.

        Args:
            named: All trainable tensors, `[n, *shape]`; as `unflatten` makes them nothing needs to
                be copied.

        Example:
            >>> layout = Layout.from_model(nn.Linear(2, 1))
            >>> named = layout.unflatten(torch.arange(6.0).reshape(2, 3))
            >>> layout.flat_behind(named)
            tensor([[0., 1., 2.],
                    [3., 4., 5.]])
            >>> layout.flat_behind({n: t.clone() for n, t in named.items()}) is None
            True
        """
        if not self.trainable:
            return None
        first = named[self.trainable[0].name]
        rows, origin = len(first), first.storage_offset()
        memory = first.untyped_storage().data_ptr()
        for spec in self.trainable:
            tensor, place = named[spec.name], self.slices[spec.name]
            strides = torch.empty(spec.shape, device="meta").stride()
            if (
                tensor.untyped_storage().data_ptr() != memory
                or tensor.dtype != self.dtype
                or tensor.shape != (rows, *spec.shape)
                or tensor.stride() != (self.dim, *strides)
                or tensor.storage_offset() != origin + place.start
            ):
                return None
        return first.as_strided((rows, self.dim), (self.dim, 1), origin)


def rows_at(rows: Tensor, places: Sequence[int]) -> Rows:
    """Return views of some rows of `[n, dim]`: one view where they lie together.

    Example:
        >>> rows = torch.arange(8).reshape(4, 2)
        >>> rows_at(rows, (1, 2)), rows_at(rows, (0, 3))
        (tensor([[2, 3],
                [4, 5]]), [tensor([0, 1]), tensor([6, 7])])
    """
    first, count = places[0], len(places)
    if list(places) == list(range(first, first + count)):
        return rows[first : first + count]
    return [rows[place] for place in places]


def _is_alias(tensor: Tensor, parameters: Mapping[str, Tensor]) -> bool:
    return any(tensor is parameter for parameter in parameters.values())


@dataclass(frozen=True)
class Payload:
    """Named tensors on their way to clients: once for all of them, or one row per client.

    Attributes:
        params: Flat trainable tensors, `[dim]` when shared, `[K, dim]` when personal; None when the
            other payload of the pair carries them.
        buffers: The model's buffers by name, with a leading K when personal.
        extra: What an algorithm sends besides the model (control variates, masks), likewise.
    """

    params: Tensor | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is carried."""
        return self.params is None and not self.buffers and not self.extra

    def rows(self, index: slice | list[int]) -> "Payload":
        """Return the given clients' rows of a personal payload."""
        return Payload(
            None if self.params is None else self.params[index],
            {name: tensor[index] for name, tensor in self.buffers.items()},
            {name: tensor[index] for name, tensor in self.extra.items()},
        )
