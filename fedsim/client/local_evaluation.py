"""Clients measure the model that they received, and their own, on samples of theirs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.client.evaluation import Evaluation, own_models
from fedsim.client.inputs import Inputs
from fedsim.client.job import OWN, PERSONALISED, ChunkJob, ChunkResult, ClientArrays
from fedsim.client.mixtures import beside_statistics
from fedsim.client.procedure import Gradient
from fedsim.client.robustness import RobustEvaluation
from fedsim.client.ways import row_of


@dataclass(frozen=True)
class LocalEvaluation:
    """Evaluates the members of a chunk on their local test splits; the model is in evaluation.

    Attributes:
        inputs: What the members received and keep.
        data: The clients' samples.
        evaluation: Measures the task's metrics.
        one_by_one: Whether members evaluate one after another, else all at once.
        adversary: How samples are moved besides; None leaves them alone.
        gradient: Gives one model's losses and their slope by the features.
    """

    inputs: Inputs
    data: ClientArrays
    evaluation: Evaluation
    one_by_one: bool
    adversary: RobustEvaluation | None
    gradient: Gradient

    def of(self, job: ChunkJob) -> ChunkResult:
        """Return every member's metrics.

        A member that keeps tensors to itself evaluates with those that it has, one with a model of
        its own with that besides. Where either is so, `personalised` says who has some.
        """
        members = list(range(len(job.client_ids)))
        present = [slot for slot in members if not job.absent[slot]]
        drawn = self.data.clients([job.client_ids[s] for s in present], split="test")
        pool = self.inputs.pool(drawn.features), self.inputs.pool(drawn.targets)
        rows = [torch.zeros(0, dtype=torch.int64)] * len(members)
        for slot, chosen in zip(present, drawn.rows, strict=True):
            rows[slot] = torch.from_numpy(np.asarray(chosen, dtype=np.int64))
        # a lone member is doubled, as in training
        slots = members if self.one_by_one or len(members) > 1 else [0, 0]
        params, buffers, _ = self.inputs.received(job, slots)
        statistics = self.inputs.own_statistics(job, slots, buffers)
        columns = self._measured({**params, **statistics}, slots, pool, rows)
        if self.inputs.procedure.has_own_model:
            state = self.inputs.state(job, slots, params)
            models, numbers = own_models(
                self.inputs.procedure, params, state, together=not self.one_by_one
            )
            own = self._measured(beside_statistics(models, statistics), slots, pool, rows)
            columns |= {f"{OWN}{name}": column for name, column in own.items()}
            columns |= {f"{OWN}{name}": number.double().cpu() for name, number in numbers.items()}
        columns = {name: column[: len(members)] for name, column in columns.items()}
        if self.inputs.start or self.inputs.procedure.has_own_model:
            known = job.has_state if job.state else [False] * len(members)
            columns[PERSONALISED] = torch.tensor(known, dtype=torch.float64)
        num_examples = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        # metrics over no samples are no numbers; such a client weighs nothing, as in training
        columns = {n: torch.where(num_examples > 0, c, 0.0) for n, c in columns.items()}
        return ChunkResult(None, {}, {}, {}, num_examples, columns)

    def _measured(
        self, named: Mapping[str, Tensor], slots: list[int], pool: Any, rows: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return each metric of every slot's model on its samples, float64 `[slots]`."""
        if self.one_by_one:
            metrics = []
            for place, slot in enumerate(slots):
                if self.inputs.surroundings.kept is not None:
                    self.inputs.surroundings.begin()  # nothing is left of the client before
                    self.evaluation.model.eval()
                mine = rows[slot].to(self.inputs.device)
                metrics.append(self.evaluation.one(row_of(named, place), pool, mine))
        else:
            metrics = self.evaluation.together(dict(named), pool, [rows[slot] for slot in slots])
        if self.adversary is not None:
            seed = self.inputs.surroundings.seed
            for found, place, slot in zip(metrics, range(len(slots)), slots, strict=True):
                found |= self.adversary.of_rows(
                    self.evaluation,
                    self.gradient,
                    row_of(named, place),
                    pool,
                    rows[slot],
                    tuple(found),
                    seed,
                )
        return {
            name: torch.tensor([row[name] for row in metrics], dtype=torch.float64)
            for name in metrics[0]
        }
