"""Algorithms at Flower's server: its own strategies where it has them, else built on FedAvg."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedProx
from torch import Tensor

Named = dict[str, Tensor]


class Stateful(FedAvg):
    """FedAvg that knows the round's model; a subclass says what becomes of the replies.

    Args:
        clients: How many are registered.
        settings: The strategy's hyperparameters.
        **arguments: FedAvg's.
    """

    def __init__(self, clients: int, settings: Mapping[str, Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.clients, self.settings = clients, settings
        self.model: Named = {}
        self.state: Named = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Note what is sent."""
        self.model = arrays.to_torch_state_dict()
        if not self.state:
            self.state = {n: torch.zeros_like(p) for n, p in self.model.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate what came without an error."""
        contents = [reply.content for reply in replies if not reply.has_error()]
        if not contents:
            return None, None
        trained = [content["arrays"].to_torch_state_dict() for content in contents]
        changes = [{n: t[n] - p for n, p in self.model.items()} for t in trained]
        return ArrayRecord(self.aggregated(changes, contents)), MetricRecord()

    def aggregated(self, changes: list[Named], contents: list[Any]) -> Named:
        """Return the new model.

        Args:
            changes: What each client's model moved by.
            contents: The replies.
        """
        raise NotImplementedError


class FedNova(Stateful):
    """Normalised averaging (Wang et al., NeurIPS 2020, equation 10)."""

    def aggregated(self, changes: list[Named], contents: list[Any]) -> Named:
        """Return x + tau_eff * sum_i p_i Delta_i / tau_i."""
        counts = [content["metrics"]["num-examples"] for content in contents]
        steps = [content["metrics"]["local-steps"] for content in contents]
        shares = [count / sum(counts) for count in counts]
        effective = sum(share * tau for share, tau in zip(shares, steps, strict=True))
        weights = [effective * share / tau for share, tau in zip(shares, steps, strict=True)]
        return {
            n: p + sum(w * change[n] for w, change in zip(weights, changes, strict=True))
            for n, p in self.model.items()
        }


class Scaffold(Stateful):
    """Control variates (Karimireddy et al., ICML 2020, Algorithm 1)."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send c besides the model."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        control = ArrayRecord(self.state)
        for message in messages:
            message.content["control"] = control
        return messages

    def aggregated(self, changes: list[Named], contents: list[Any]) -> Named:
        """Return x + mean_S Delta_i, and let c gain sum_S (c_i+ - c_i) / N."""
        gained = [content["control"].to_torch_state_dict() for content in contents]
        self.state = {
            n: c + sum(each[n] for each in gained) / self.clients for n, c in self.state.items()
        }
        return {
            n: p + sum(change[n] for change in changes) / len(changes)
            for n, p in self.model.items()
        }


class FedDyn(Stateful):
    """Dynamic regularisation (Acar et al., ICLR 2021, Algorithm 1)."""

    def aggregated(self, changes: list[Named], contents: list[Any]) -> Named:
        """Return mean_P w_k - h / alpha, with h - alpha * sum_P Delta_k / m in place of h."""
        alpha = self.settings["alpha"]
        total = {n: sum(change[n] for change in changes) for n in self.model}
        self.state = {n: h - alpha * total[n] / self.clients for n, h in self.state.items()}
        return {
            n: p + total[n] / len(changes) - self.state[n] / alpha for n, p in self.model.items()
        }


def strategy(table: Mapping[str, Any], clients: int, **arguments: Any) -> FedAvg:
    """Return the strategy of a scenario's table.

    Args:
        table: `[strategy]`, every hyperparameter in it.
        clients: How many are registered.
        **arguments: FedAvg's.
    """
    name = table["name"]
    if name in ("fedavg", "ditto"):
        return FedAvg(**arguments)
    if name == "fedprox":
        return FedProx(proximal_mu=table["mu"], **arguments)
    made = {"fednova": FedNova, "scaffold": Scaffold, "feddyn": FedDyn}[name]
    return made(clients, table, **arguments)
