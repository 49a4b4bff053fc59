"""Ray itself, for those who need it, or the error that says how to install it."""

from fedsim.basics.errors import RunError

try:
    import ray
    import ray.exceptions
    import ray.util.scheduling_strategies
except ImportError as error:  # pragma: no cover - exercised in an environment without ray
    raise RunError(
        "ray is not installed, so [engine] kind = 'ray' cannot run; install it with "
        "`pip install 'flwr[simulation]'`, or use [engine] kind = 'inline'"
    ) from error

__all__ = ["ray"]
