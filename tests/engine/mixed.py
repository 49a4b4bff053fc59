"""A grid some of whose workers are told that they do not see the driver's memory."""

from fedsim.engine.ray.grid import RayGrid


class MixedGrid(RayGrid):
    """As on a Ray cluster of two machines; its second worker is told so."""

    def _start_worker(self, number):
        probe = self._probe
        if number == 1:
            self._probe = None
        try:
            return super()._start_worker(number)
        finally:
            self._probe = probe
