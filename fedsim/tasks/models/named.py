"""The models that a scenario can name: functions from a data set's shapes to a `torch.nn.Module`.

A factory's keyword arguments are its scenario keys, except `SHAPE_ARGUMENTS`, which come from the
data. A model gives logits, or the numbers of a regression; initialisation is torch's own, drawn
from torch's CPU generator, which `Task.build_model` seeds. A user's own factory or module class is
named by import path and gets those shape arguments that it takes.
"""

import inspect
import math
from collections.abc import Callable

from torch import nn

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.import_paths import is_import_path, resolve
from fedsim.basics.samples import SampleSpec
from fedsim.tasks.models.mcmahan import mcmahan_cifar, mcmahan_mnist
from fedsim.tasks.models.recurrent import char_lstm
from fedsim.tasks.models.resnet import resnet8, resnet18
from fedsim.tasks.models.simple import cnn, cnn_batchnorm, linear, logistic, mlp, mlp_dropout

SHAPE_ARGUMENTS = ("feature_shape", "num_classes", "vocabulary")

MODELS: dict[str, Callable[..., nn.Module]] = {
    "logistic": logistic,
    "linear": linear,
    "mlp": mlp,
    "cnn": cnn,
    "mlp_dropout": mlp_dropout,
    "cnn_batchnorm": cnn_batchnorm,
    "mcmahan_mnist": mcmahan_mnist,
    "mcmahan_cifar": mcmahan_cifar,
    "resnet8": resnet8,
    "resnet18": resnet18,
    "char_lstm": char_lstm,
}


def model_factory(name: str) -> Callable[..., nn.Module]:
    """Return the factory that a scenario names: one of `MODELS`, or an import path.

    Raises:
        ScenarioError: If there is none of that name, or what the path names cannot be called.
    """
    if is_import_path(name):
        factory = resolve(name, what="[task] model")
        if not callable(factory):
            raise ScenarioError(
                f"[task] model = '{name}': names a {type(factory).__name__}, expected a function "
                "or class that returns a torch.nn.Module"
            )
        return factory
    if name not in MODELS:
        raise ScenarioError(
            f"[task] model: {unknown(name, 'a model', MODELS)}, or 'package.module:name'"
        )
    return MODELS[name]


def shape_arguments(factory: Callable[..., nn.Module], spec: SampleSpec) -> dict[str, object]:
    """Return those of the data's shape arguments that a factory takes.

    `num_classes` is the number of outputs: where targets are numbers, how many one target has.
    """
    given = {
        "feature_shape": spec.feature_shape,
        "num_classes": spec.num_classes or math.prod(spec.target_shape),
        "vocabulary": spec.vocabulary,
    }
    parameters = inspect.signature(factory).parameters
    return {name: value for name, value in given.items() if name in parameters}
