"""A network in a form that torch alone can load: its source, else a program of `torch.export`.

A chain of torch's own layers is written out as Python. Any other model is traced, for any number of
samples. One that cannot be traced is named by its factory, which must be there where it is loaded.
Either form is tried against the model before it is taken.
"""

import ast
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedsim.basics.samples import SampleSpec
from fedsim.tasks.models.named import model_factory, shape_arguments
from fedsim.tasks.named import own_keys
from fedsim.tasks.options import OPTION_KEYS
from fedsim.tasks.task import Task

SOURCE_FILE, PROGRAM_FILE = "network.py", "network.pt2"
_TRIED = (2, 3, 1)  # numbers of samples


class Network(NamedTuple):
    """How a network is had outside of fedsim.

    Attributes:
        files: Content by name.
        imports: A line that imports what the next ones need; empty for none.
        build: Lines that make `model`, without its weights.
        ready: Lines that switch the model, with its weights, to evaluation; perhaps none.
        needs: Code that must be there where it is loaded, by import path; None for torch alone.
    """

    files: dict[str, bytes]
    imports: str
    build: str
    ready: tuple[str, ...] = ("model.eval()",)
    needs: str | None = None


def network_of(model: nn.Module, task: Task, table: Mapping[str, Any]) -> Network:
    """Return a model's network as files and lines of Python.

    Args:
        model: The model in evaluation mode.
        task: Its task.
        table: The scenario's table [task].
    """
    if (source := _as_source(model, task)) is not None:
        return Network(
            {SOURCE_FILE: source.encode()}, "from network import build", "model = build()"
        )
    if (program := _as_program(model, task)) is not None:
        load = f'model = torch.export.load("{PROGRAM_FILE}").module()'
        return Network({PROGRAM_FILE: program}, "", load, ready=())
    return _as_import(task, table)


def _samples(spec: SampleSpec, dtype: torch.dtype, count: int) -> Tensor:
    """Features that a model may be tried on."""
    random = torch.Generator().manual_seed(count)
    shape = (count, *spec.feature_shape)
    if spec.vocabulary:
        return torch.randint(spec.vocabulary, shape, generator=random)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def _gives_the_same(model: nn.Module, other: Callable[[Tensor], Any], task: Task) -> bool:
    """Whether two networks agree on a few samples, up to the order of sums."""
    with torch.no_grad():
        for count in _TRIED:
            features = _samples(task.spec, task.dtype, count)
            expected, found = model(features), other(features)
            if not isinstance(found, Tensor) or found.shape != expected.shape:
                return False
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
                return False
    return True


# --- as source


def _as_source(model: nn.Module, task: Task) -> str | None:
    """The Python of a chain of torch's layers; None for any other model."""
    if type(model) is not nn.Sequential:
        return None
    found = _chain(model, depth=1)
    if found is None:
        return None
    rebuilt, text = found
    state = model.state_dict()
    if {n: t.shape for n, t in rebuilt.state_dict().items()} != {
        n: t.shape for n, t in state.items()
    }:
        return None
    rebuilt = rebuilt.to(task.dtype).eval()
    rebuilt.load_state_dict(state)
    if not _gives_the_same(model, rebuilt, task):
        return None
    cast = "" if task.dtype == torch.float32 else f".to({task.dtype})"
    imports = "import torch\nfrom torch import nn\n" if cast else "from torch import nn\n"
    if "OrderedDict" in text:
        imports = f"from collections import OrderedDict\n\n{imports}"
    return (
        f'"""The network, without its weights."""\n\n{imports}\n\n'
        f"def build():\n    return {text}{cast}\n"
    )


def _chain(model: nn.Sequential, depth: int) -> tuple[nn.Module, str] | None:
    """A chain made anew, and the words; None where a layer cannot be."""
    layers: list[tuple[str, nn.Module]] = []
    words = []
    numbered = [name for name, _ in model.named_children()] == [*map(str, range(len(model)))]
    for name, layer in model.named_children():
        known = _chain(layer, depth + 1) if type(layer) is nn.Sequential else _layer(layer)
        if known is None:
            return None
        layers.append((name, known[0]))
        words.append(known[1] if numbered else f'("{name}", {known[1]})')
    inside, outside = "    " * (depth + 1), "    " * depth
    lines = "".join(f"{inside}{word},\n" for word in words)
    if numbered:
        return _ordered(layers), f"nn.Sequential(\n{lines}{outside})"
    return _ordered(layers), f"nn.Sequential(OrderedDict([\n{lines}{outside}]))"


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _ordered(layers: list[tuple[str, nn.Module]]) -> nn.Module:
    made = nn.Sequential()
    for name, layer in layers:
        made.add_module(name, layer)
    return made


def _layer(layer: nn.Module) -> tuple[nn.Module, str] | None:
    """One of torch's layers made anew from what it says of itself, and the words; or None."""
    kind = type(layer)
    if not kind.__module__.startswith("torch.nn.modules.") or list(layer.children()):
        return None
    try:
        call = ast.parse(repr(layer), mode="eval").body
        assert isinstance(call, ast.Call)
        places = [ast.literal_eval(each) for each in call.args]
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        with torch.random.fork_rng(devices=[]):
            made: nn.Module = kind(*places, **named)
    except (AssertionError, SyntaxError, ValueError, TypeError):
        return None
    return (made, f"nn.{layer!r}") if repr(made) == repr(layer) else None


# --- as a program


def _as_program(model: nn.Module, task: Task) -> bytes | None:
    """The model traced by torch for any number of samples; None where that cannot be."""
    if isinstance(model, torch.jit.ScriptModule):
        return None
    samples = torch.export.Dim("samples", min=1)
    features = _samples(task.spec, task.dtype, _TRIED[0])
    content = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.export.export(model, (features,), dynamic_shapes=(({0: samples}),))
            torch.export.save(traced, content)
            again = torch.export.load(io.BytesIO(content.getvalue())).module()
        again.load_state_dict(model.state_dict())
        fits = _gives_the_same(model, again, task)
    except Exception:  # torch refuses a model by errors of many kinds, or its own code does
        return None
    return content.getvalue() if fits else None


# --- by its factory


def _as_import(task: Task, table: Mapping[str, Any]) -> Network:
    """How the factory is called, which has to be there."""
    factory = model_factory(table.get("model", "logistic"))
    others = {*OPTION_KEYS, *own_keys(type(task)), "kind", "model", "dtype"}
    arguments = {key: value for key, value in table.items() if key not in others}
    arguments |= shape_arguments(factory, task.spec)
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    module, name = factory.__module__, factory.__qualname__
    return Network(
        {},
        f"from {module} import {name.partition('.')[0]}",
        f"model = {name}({shown}).to({task.dtype})",
        needs=f"{module}:{name}",
    )
