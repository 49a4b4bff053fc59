"""Clients that are asked and do not answer."""

from flwr.serverapp import Grid

from fedsim.federation.devices import DeviceModel
from fedsim.federation.grids.wrapper import GridWrapper, training_round, without
from fedsim.messages.cohort import Cohort
from fedsim.messages.replies import Replies


class AbsenceGrid(GridWrapper):
    """Lets clients drop out as their devices say, after the instruction has been sent.

    Stands inside the Grid that counts bytes, close to the clients.

    Args:
        inner: The Grid around which this one stands.
        model: The devices.
    """

    def __init__(self, inner: Grid, model: DeviceModel) -> None:
        super().__init__(inner)
        self.model = model

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies of those who do not drop out."""
        if (server_round := training_round(cohort)) is not None:
            fates = self.model.fates(server_round, cohort.client_ids)
            cohort = without(cohort, cohort.client_ids[fates.gone])
        return self.passed_on(cohort, timeout)
