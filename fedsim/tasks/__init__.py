"""What is learnt: a model, a loss and metrics, by name or import path. Needs torch alone."""

from typing import TYPE_CHECKING

from fedsim.basics.faces import lazy

if TYPE_CHECKING:
    from fedsim.tasks.classification import Classification, NextCharacter
    from fedsim.tasks.named import TASKS, make_task
    from fedsim.tasks.options import BufferPolicy, TaskOptions
    from fedsim.tasks.regression import Regression
    from fedsim.tasks.task import Task

__all__ = [
    "TASKS",
    "BufferPolicy",
    "Classification",
    "NextCharacter",
    "Regression",
    "Task",
    "TaskOptions",
    "make_task",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "BufferPolicy": "fedsim.tasks.options",
        "Classification": "fedsim.tasks.classification",
        "NextCharacter": "fedsim.tasks.classification",
        "Regression": "fedsim.tasks.regression",
        "TASKS": "fedsim.tasks.named",
        "Task": "fedsim.tasks.task",
        "TaskOptions": "fedsim.tasks.options",
        "make_task": "fedsim.tasks.named",
    },
)
