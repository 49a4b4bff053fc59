"""A grid some of whose workers are told that they do not see the driver's memory."""

import pytest

from fedsim.engine.ray.grid import RayGrid
from fedsim.engine.ray.workers import Workers


class MixedWorkers(Workers):
    """As on a Ray cluster of two machines; the second worker is told so."""

    def _start(self, number):
        sign = self._sign
        if number == 1:
            self._sign = None
        try:
            return super()._start(number)
        finally:
            self._sign = sign


class MixedGrid(RayGrid):
    """A grid with such workers."""

    def __init__(self, *arguments, **named):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedsim.engine.ray.grid.Workers", MixedWorkers)
            super().__init__(*arguments, **named)
