"""Evaluation of one model, or of a chunk of clients at once. Needs torch alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedsim.client.mixtures import outputs_of
from fedsim.client.procedure import ClientProcedure, Named

Pool = tuple[Tensor, Tensor]


class MeasurableTask(Protocol):
    """What evaluation asks of a task, as `fedsim.tasks.Task` offers it."""

    dtype: torch.dtype

    def statistics(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return additive sums over the samples that are not padding."""

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return metrics from those sums."""


class WholeMeasurableTask(Protocol):
    """What evaluation asks of a task besides whose `wants_outputs` is true."""

    def metrics_of_outputs(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return metrics from all outputs at once."""


@dataclass(frozen=True)
class Evaluation:
    """Measures a task's metrics.

    Attributes:
        model: The model, in evaluation mode; its tensors are given at each call.
        task: Statistics and metrics.
        batch: Samples per forward pass of one model; part of the bits.
        step: Samples per client and forward pass when many evaluate at once; part of the bits.
    """

    model: nn.Module
    task: MeasurableTask
    batch: int
    step: int = 100

    @property
    def _wants_outputs(self) -> bool:
        return getattr(self.task, "wants_outputs", False)

    def one(self, named: dict[str, Tensor], pool: Pool, rows: Tensor) -> dict[str, float]:
        """Return the metrics of one model.

        Args:
            named: The model's tensors.
            pool: Features and targets `[n, ...]`, on the model's device.
            rows: Which of them, int64 on the device.
        """
        sums: dict[str, Tensor] = {}
        kept: list[Tensor] = []
        for start in range(0, max(len(rows), 1), self.batch):
            index = rows[start : start + self.batch]
            weights = torch.ones(len(index), dtype=self.task.dtype, device=rows.device)
            if not len(index) and len(pool[1]):
                # few models take no sample: two that do not count
                index, weights = index.new_zeros(2), weights.new_zeros(2)
            outputs = outputs_of(self.model, named, self.cast(pool[0][index]))
            sums = _added(sums, self.task.statistics(outputs, pool[1][index], weights))
            if self._wants_outputs:
                kept.append(outputs[: len(rows)].cpu())
        return self._metrics(sums, torch.cat(kept) if kept else None, pool, rows)

    def together(
        self, named: dict[str, Tensor], pool: Pool, rows: Sequence[Tensor]
    ) -> list[dict[str, float]]:
        """Return the metrics of many models, each on rows of its own, as one batched call.

        Args:
            named: The models' tensors, `[slots, ...]`, at least two slots.
            pool: Features and targets `[n, ...]`, on the model's device.
            rows: Each slot's rows, int64 on the CPU.
        """
        device = pool[1].device
        longest = max(len(mine) for mine in rows)
        index = torch.zeros((len(rows), max(longest, 1)), dtype=torch.int64)
        weights = torch.zeros(index.shape, dtype=self.task.dtype)
        for slot, mine in enumerate(rows):
            index[slot, : len(mine)] = mine
            weights[slot, : len(mine)] = 1
        index, weights = index.to(device), weights.to(device)

        def statistics(
            named: dict[str, Tensor], x: Tensor, y: Tensor, weight: Tensor
        ) -> tuple[dict[str, Tensor], Tensor]:
            outputs = outputs_of(self.model, named, x)
            return self.task.statistics(outputs, y, weight), outputs

        sums: dict[str, Tensor] = {}
        kept: list[Tensor] = []
        # a constant step: how a client's samples are cut must not depend on its neighbours
        step = self.step
        for start in range(0, index.shape[1], step):
            picked, weight = index[:, start : start + step], weights[:, start : start + step]
            short = step - picked.shape[1]
            picked, weight = (nn.functional.pad(t, (0, short)) for t in (picked, weight))
            part, outputs = vmap(statistics)(
                named, self.cast(pool[0][picked]), pool[1][picked], weight
            )
            sums = _added(sums, part)
            if self._wants_outputs:
                kept.append(outputs.cpu())
        every = torch.cat(kept, dim=1) if kept else None
        return [
            self._metrics(
                {name: sum_[slot] for name, sum_ in sums.items()},
                None if every is None else every[slot, : len(mine)],
                pool,
                mine.to(device),
            )
            for slot, mine in enumerate(rows)
        ]

    def _metrics(
        self, sums: Mapping[str, Tensor], outputs: Tensor | None, pool: Pool, rows: Tensor
    ) -> dict[str, float]:
        metrics = self.task.metrics(
            {name: float(s) if s.dim() == 0 else s.cpu() for name, s in sums.items()}
        )
        if outputs is None:
            return metrics
        whole = cast(WholeMeasurableTask, self.task)
        return {**metrics, **whole.metrics_of_outputs(outputs, pool[1][rows].cpu())}

    def cast(self, features: Tensor) -> Tensor:
        """Return features as the model takes them."""
        return features.to(self.task.dtype) if features.is_floating_point() else features


def _added(sums: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: sums[n] + v.double() if n in sums else v.double() for n, v in part.items()}


def own_models(
    procedure: ClientProcedure, params: Named, state: Named, *, together: bool
) -> tuple[Named, Named]:
    """Return (every slot's own model, numbers that tell of its state), a row for each.

    Args:
        procedure: What clients do, which has a model of its own.
        params: What each slot received, `[slots, ...]`.
        state: The state of each, likewise.
        together: Whether all are asked in one batched call, else one after another.
    """
    if together:
        models, numbers = vmap(procedure.own_model)(params, state)
        return models, numbers
    slots = len(next(iter(params.values())))
    rows = [
        [{n: t[slot] for n, t in of.items()} for of in (params, state)] for slot in range(slots)
    ]
    found = [procedure.own_model(*row) for row in rows]
    stacked = [
        {n: torch.stack([f[part][n] for f in found]) for n in found[0][part]} for part in (0, 1)
    ]
    return stacked[0], stacked[1]
