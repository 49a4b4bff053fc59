"""How much one client may weigh and how far one reply may move the model."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import MessageType
from torch import Tensor

from fedsim.federation.admission_table import Admission
from fedsim.messages.admission import MAX_EXAMPLES
from fedsim.messages.cohort import SETUP
from fedsim.messages.encoded import is_against_memory, read_memory
from fedsim.messages.failures import Failure
from fedsim.messages.replies import Replies

_MEANINGFUL = 3  # replies from which on a median holds a single one of them off
Refusal = tuple[npt.NDArray[np.bool_], str, list[str]]


class Bounds:
    """What replies are held against besides their form.

    A client is not weighed by more samples than it is known to hold, and the norm of its update is
    bounded where the scenario says so. What batch normalisation keeps is what training can make of
    it: a variance is not negative, and batches are counted upwards.

    Args:
        sizes: Gives the training samples of clients, int64 `[K]` of ids `[K]`; None knows of none.
        table: What the scenario says of updates; None bounds none.
    """

    def __init__(
        self,
        sizes: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]] | None = None,
        table: Admission | None = None,
    ) -> None:
        self._sizes, self._table = sizes, table or Admission()

    def held(self, replies: Replies, sent: Mapping[str, Tensor]) -> Replies:
        """Return the replies within all bounds, with the others named among the failures.

        Args:
            replies: Admitted ones: they are finite.
            sent: The buffers that clients were sent, by name: the same for all, or a row for each
                client that replied.
        """
        if not replies.num_clients:
            return replies
        keep = np.ones(replies.num_clients, dtype=bool)
        failures: list[Failure] = []
        for beyond, cause, why in self._refusals(replies, sent):
            for place in np.flatnonzero(beyond & keep).tolist():
                client = int(replies.client_ids[place])
                failures.append(Failure(client, replies.server_round, cause, why[place]))
            keep &= ~beyond
        return replies.select(keep, failures)

    def _refusals(self, replies: Replies, sent: Mapping[str, Tensor]) -> Iterator[Refusal]:
        """Yield who is beyond a bound, bool `[K]`, the cause, and what is wrong with each."""
        if self._sizes is not None and replies.message_type in (MessageType.TRAIN, SETUP):
            known, said = self._sizes(replies.client_ids), replies.num_examples.numpy()
            pairs = zip(said.tolist(), known.tolist(), strict=True)
            yield (
                said > known,
                "num-examples",
                [f"{count} examples: its partition holds {held}" for count, held in pairs],
            )
        yield from _of_buffers(replies, sent)
        if replies.message_type == MessageType.TRAIN and replies.params is not None:
            yield from self._of_updates(replies)

    def _of_updates(self, replies: Replies) -> Iterator[Refusal]:
        fixed, factor = self._table.max_update_norm, self._table.max_update_factor
        if fixed is None and factor is None:
            return
        norms = update_norms(replies)
        if fixed is not None:
            why = f"above [admission] max_update_norm = {fixed:g}"
            yield (
                norms > fixed,
                "update norm",
                [f"the update has norm {n:.6g}, {why}" for n in norms],
            )
        if factor is not None and len(norms) >= _MEANINGFUL:
            middle = float(np.median(norms))
            why = f"above [admission] max_update_factor = {factor:g} times the round's {middle:.6g}"
            said = [f"the update has norm {n:.6g}, {why}" for n in norms]
            yield norms > factor * middle, "update norm", said


def update_norms(replies: Replies) -> npt.NDArray[np.float64]:
    """Return the Euclidean norm of each client's update, float64 `[K]`.

    Args:
        replies: Of a training round. Where they are written against what the server has of the
            client, of what each adds to that.
    """
    moved = replies.update
    if is_against_memory(replies.encoded):
        moved = read_memory(torch.zeros_like(moved), replies.encoded)
    return _norms(moved)


def _of_buffers(replies: Replies, sent: Mapping[str, Tensor]) -> Iterator[Refusal]:
    """Yield whose buffers of batch normalisation no training can have made."""
    for name, stack in replies.buffers.items():
        own, rows = name.rpartition(".")[2], stack.reshape(len(stack), -1)
        if own == "running_var" and rows.shape[1]:
            negative = (rows < 0).any(dim=1).numpy()
            yield negative, "buffers", [f"'{name}' holds a negative variance"] * len(rows)
        if own == "num_batches_tracked" and name in sent and rows.shape[1]:
            before = sent[name]
            before = before.reshape(len(rows) if before.dim() == stack.dim() else 1, -1)
            odd = ((rows < before) | (rows > before + MAX_EXAMPLES)).any(dim=1).numpy()
            least = int(before.max())
            why = f"'{name}' must be in {least}..{least + MAX_EXAMPLES}: it counts batches"
            yield odd, "buffers", [why] * len(rows)


def _norms(rows: Tensor) -> npt.NDArray[np.float64]:
    """Norms of rows `[K, dim]`, one by one, so that none depends on its neighbours."""
    found = [float(torch.linalg.vector_norm(row, dtype=torch.float64)) for row in rows]
    return np.array(found, dtype=np.float64)
