"""Clients that are asked and do not answer."""

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.federation.devices import DeviceModel
from fedsim.federation.grids.wrapper import GridWrapper, clients_of, sent_round, without
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout


class AbsenceGrid(GridWrapper):
    """Lets clients drop out as their devices say, after the instruction has been sent.

    Stands inside the Grid that counts bytes, close to the clients.

    Args:
        inner: The Grid around which this one stands.
        model: The devices.
        layout: The model's layout, when `inner` is an engine that trains in chunks.
    """

    def __init__(self, inner: Grid, model: DeviceModel, layout: Layout | None) -> None:
        super().__init__(inner)
        self.model, self.layout = model, layout

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions to those who do not drop out."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        server_round = sent_round(batch)
        if server_round is not None:
            ids = clients_of(batch)
            gone = ids[self.model.fates(server_round, ids).gone]
            batch = without(batch, gone, self.layout)
        return self.inner.send_and_receive(batch, timeout=timeout)
