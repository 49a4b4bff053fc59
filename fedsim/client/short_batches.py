"""Clients whose epochs end with a batch that a model cannot train on, found before round 1."""

import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.basics.generators import put_back
from fedsim.basics.kept_state import KeptState
from fedsim.client.procedure import Work


def ends_with_one(sizes: np.ndarray, work: Work) -> np.ndarray:
    """Tell which clients train on a batch of one sample in a round, bool `[N]`.

    Args:
        sizes: Samples of each client, int64 `[N]`.
        work: What a client does in a round.

    Example:
        >>> ends_with_one(np.array([30, 11, 1, 0]), Work(10, epochs=1, steps=None)).tolist()
        [False, True, True, False]
    """
    if work.batch_size == 1:
        return sizes > 0
    if work.last_batch != "keep":
        return np.zeros(len(sizes), dtype=bool)
    passes = -(-sizes // work.batch_size)
    whole = np.ones(len(sizes), dtype=bool) if work.steps is None else work.steps >= passes
    ends: np.ndarray = (sizes % work.batch_size == 1) & whole
    return ends


def odd_sizes(sizes: np.ndarray, work: Work) -> np.ndarray:
    """Return the size of the one batch of a client's pass that is not full, int64 `[N]`; 0 if none.

    Args:
        sizes: Samples of each client, int64 `[N]`.
        work: What a client does in a round.

    Example:
        >>> sizes = np.array([30, 13, 4, 0])
        >>> odd_sizes(sizes, Work(10, epochs=1, steps=None)).tolist()
        [0, 3, 4, 0]
        >>> odd_sizes(sizes, Work(10, epochs=1, steps=None, last_batch="merge")).tolist()
        [0, 13, 4, 0]
    """
    different, places = np.unique(sizes, return_inverse=True)
    last = np.zeros(len(different), dtype=np.int64)
    for place, held in enumerate(different.tolist()):
        passes, samples = work.batches(held)
        if samples != work.batch_size and (work.steps is None or work.steps >= passes):
            last[place] = samples
    return last[places]


def first_trouble(
    sizes: Iterable[int], model: nn.Module, features: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[int, str] | None:
    """Return the first size of a batch that a model cannot train on, and the layer; None if none.

    Args:
        sizes: Sizes to try.
        model: The model; it is left as it was.
        features: A batch that it must be able to train on: else it is another matter. Larger ones
            hold its samples again and again.
        loss: Gives the samples' losses `[n]` from the outputs.
    """
    if _trouble(model, features, loss) is not None:
        return None
    for size in sizes:
        rows = torch.arange(size, device=features.device) % len(features)
        if (layer := _trouble(model, features[rows], loss)) is not None:
            return size, layer
    return None


def _trouble(model: nn.Module, features: Tensor, loss: Callable[[Tensor], Tensor]) -> str | None:
    kept, entered = KeptState([model]), list[str]()
    hooks = [
        module.register_forward_pre_hook(lambda m, _, n=name: entered.append(_shown(m, n)))
        for name, module in model.named_modules()
    ]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    try:
        with put_back(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of one sample is said below
            found = loss(functional_call(model.train(), buffers, (features,)))
        return None if bool(torch.isfinite(found).all()) else "the model, which gives no number"
    except Exception:  # of any kind: a client would fail by it
        return entered[-1] if entered else "the model"
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        kept.put_back()


def _shown(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} '{name}'" if name else type(module).__name__
