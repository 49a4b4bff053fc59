"""pfl-research: its federated averaging with the simulated backend, in one process.

Users' tensors are resident (`PyTorchTensorDataset`, whose batches pfl makes once, unshuffled), the
sampler is the one its documentation recommends, users are weighted by their data points.
"""

import itertools
from typing import Any

import baton
import torch
import torch_models
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.version import __version__
from torch import nn
from torch.nn.functional import cross_entropy

FOREVER = 10**9


class Net(nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        return cross_entropy(self.net(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        """Measure nothing: evaluation is off."""
        return {}


class Turns(TrainingProcessCallback):
    """Hands the baton over after each central iteration."""

    def __init__(self, turns: baton.Baton) -> None:
        self._turns = turns

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Stop when there is no further turn."""
        going = self._turns.ended(lambda: torch_models.named(model.pytorch_model.net))
        return not going, Metrics()


def main() -> None:
    """Run rounds as the harness asks for them."""
    work = baton.workload()
    torch.set_num_threads(work["threads"])
    x, y, offsets = baton.pool(work)
    features, targets = torch.from_numpy(x), torch.from_numpy(y)
    shares = len(offsets) - 1
    users = [
        PyTorchTensorDataset((features[start:end], targets[start:end]), user_id=str(share))
        for share, (start, end) in enumerate(itertools.pairwise(offsets))
    ]
    sampler = get_user_sampler("minimize_reuse", list(range(work["clients"])))
    data = FederatedDataset(lambda user: users[user % shares], sampler)
    net = Net(torch_models.make(work["model"], baton.initial(work)))
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    turns = baton.Baton(pfl=__version__, torch=torch.__version__, threads=work["threads"])
    if not turns.wait():
        return
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(FOREVER, FOREVER, work["cohort"], None),
        backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work["lr"], local_batch_size=work["batch"]
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Turns(turns)],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main()
