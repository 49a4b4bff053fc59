"""Where clients' samples lie: all in this process, or at sites of their own."""

from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import FederatedData
from fedsim.scenario.scenario import Scenario


def check_where_data_lie(scenario: Scenario, data: FederatedData) -> None:
    """Refuse what needs all clients' samples in a process that does not have them.

    Raises:
        ScenarioError: Naming the key.
    """
    if data.is_whole:
        return
    for key, asked, instead in (
        ("[evaluation] pooled = true", scenario.evaluation.pooled, "use [evaluation] clients"),
        (
            "[partition] centralised = true",
            scenario.partition.get("centralised"),
            "leave it to a simulation",
        ),
        (
            f"[participation] kind = '{scenario.participation.get('kind')}'",
            scenario.choices["participation"].make().needs_labels,
            "use another kind, or a trace",
        ),
    ):
        if asked:
            raise ScenarioError(
                f"{key}: needs the samples of all clients in one place, and they lie at sites of "
                f"their own; {instead}"
            )
