"""Objects of the user's own, named in a scenario by import path: `package.module:name`."""

import ast
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from fedsim.errors import ScenarioError, nearest

_beside: list[str] = []


def is_import_path(name: str) -> bool:
    """Tell an import path from a name that fedsim knows itself.

    Example:
        >>> is_import_path("my_models.vision:small_cnn"), is_import_path("mlp")
        (True, False)
    """
    return ":" in name


def search_beside(folder: Path, path: str) -> None:
    """Look for modules in a scenario's folder too, last of all, if what `path` names lies there."""
    module = path.partition(":")[0].partition(".")[0]
    if not module.isidentifier():
        return
    place = str(folder.resolve())
    found = os.path.join(place, module)  # os.path says no to what can be no path at all
    lies_there = os.path.isdir(found) or os.path.isfile(f"{found}.py")
    if lies_there and place not in sys.path:
        sys.path.append(place)
        _beside.append(place)


def folders_beside() -> list[str]:
    """Return the folders that `search_beside` has added: worker processes need them as well."""
    return list(_beside)


def names_in_source(module: str, variable: str) -> list[str] | None:
    """Read the names that a module lists, without importing it: some take seconds.

    Args:
        module: The module, as it is imported.
        variable: A dictionary whose keys are names, or a list of names.

    Returns:
        The names in their order; None where they are not written down as strings.

    Example:
        >>> names_in_source("fedsim.attacks", "ATTACKS")[:2]
        ['uniform', 'sign_flip']
    """
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin)
    if inner:
        place = source.parent.joinpath(*inner)
        source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not source.is_file():
        return None
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            value = getattr(node, "value", None)
            listed = getattr(value, "keys", None) or getattr(value, "elts", None) or [None]
            found = [getattr(each, "value", None) for each in listed]
            names = [name for name in found if isinstance(name, str)]
            return names if len(names) == len(found) else None
    return None


def resolve(path: str, *, what: str) -> object:
    """Import the object that `path` names.

    Args:
        path: `package.module:name`; the name may have dots (`module:Class.method`).
        what: The place that asks, as the message shall begin ("[task] model").

    Raises:
        ScenarioError: If the path is malformed, the module cannot be imported or lacks the name.

    Example:
        >>> resolve("collections:OrderedDict", what="[task] model").__name__
        'OrderedDict'
    """
    where = f"{what} = '{path}'"
    module_name, _, name = path.partition(":")
    parts = name.split(".")
    if not all(part.isidentifier() for part in (*module_name.split("."), *parts)):
        raise ScenarioError(f"{where}: an import path reads 'package.module:name'")
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        asked = f"{module_name}.".startswith(f"{error.name}.")
        needs = "" if asked else f"module '{module_name}' needs a missing one: "
        advice = "; is the folder that holds it on PYTHONPATH?" if asked else ""
        raise ScenarioError(f"{where}: {needs}no module named '{error.name}'{advice}") from error
    except Exception as error:
        kind = type(error).__name__
        raise ScenarioError(
            f"{where}: importing '{module_name}' failed with {kind}: {error}"
        ) from error
    for part in parts:
        if not hasattr(found, part):
            guess = nearest(part, (n for n in dir(found) if not n.startswith("_")))
            hint = f"; did you mean '{guess}'?" if guess else ""
            raise ScenarioError(f"{where}: '{module_name}' has no '{part}'{hint}")
        found = getattr(found, part)
    return found
