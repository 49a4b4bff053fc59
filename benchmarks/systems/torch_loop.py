"""A bare torch loop on one thread: what anybody would write in an afternoon.

One model object trains every client in turn; a weighted mean of the state dicts is the next model.
"""

import baton
import numpy as np
import torch
import torch_models
from torch.nn.functional import cross_entropy


def main() -> None:
    """Run rounds as the harness asks for them."""
    work = baton.workload()
    torch.set_num_threads(1)
    x, y, offsets = baton.pool(work)
    features, targets = torch.from_numpy(x), torch.from_numpy(y)
    shares = len(offsets) - 1
    model = torch_models.make(work["model"], baton.initial(work))
    random = np.random.default_rng(0)
    server = {name: value.clone() for name, value in model.state_dict().items()}
    turns = baton.Baton(torch=torch.__version__, threads=1)
    going = turns.wait()
    while going:
        total, examples = {name: torch.zeros_like(value) for name, value in server.items()}, 0
        for client in random.choice(work["clients"], work["cohort"], replace=False):
            start, end = offsets[client % shares], offsets[client % shares + 1]
            model.load_state_dict(server)
            optimizer = torch.optim.SGD(model.parameters(), lr=work["lr"])
            order = start + torch.from_numpy(random.permutation(end - start))
            for rows in order.split(work["batch"]):
                optimizer.zero_grad()
                cross_entropy(model(features[rows]), targets[rows]).backward()
                optimizer.step()
            for name, value in model.state_dict().items():
                total[name].add_(value, alpha=float(end - start))
            examples += int(end - start)
        server = {name: value / examples for name, value in total.items()}
        going = turns.ended(lambda: {n: v.numpy() for n, v in server.items()})  # noqa: B023


if __name__ == "__main__":
    main()
