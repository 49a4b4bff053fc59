"""Workers some of which are told that they do not see the driver's memory."""

from tests.engine.ray.lent import LentWorkers


class MixedWorkers(LentWorkers):
    """As on a Ray cluster of two machines; the second worker is told so."""

    def _start(self, number):
        sign = self._sign
        if number == 1:
            self._sign = None
        try:
            return super()._start(number)
        finally:
            self._sign = sign
