"""How many Byzantine updates a rule bears, and what it says when they are too many."""

from typing import NamedTuple


class Bound(NamedTuple):
    """At least `factor * f + more` updates for f Byzantine ones; none of it when f is 0.

    Attributes:
        factor: Updates that each Byzantine one asks for.
        more: Updates besides.
    """

    factor: int
    more: int

    def least(self, num_byzantine: int) -> int:
        """Return the fewest updates for f."""
        return self.factor * num_byzantine + self.more if num_byzantine else 1

    def bearable(self, updates: int) -> int:
        """Return the largest f that so many updates bear."""
        return max(0, (updates - self.more) // self.factor)

    def require(self, updates: int, num_byzantine: int) -> None:
        """Refuse an f that so many updates do not bear.

        Raises:
            ValueError: Naming the bound and the largest f.

        Example:
            >>> Bound(4, 3).require(10, 2)
            Traceback (most recent call last):
            ...
            ValueError: num_byzantine = 2 with 10 updates: must be such that there are at least \
4 num_byzantine + 3 = 11; use at most 1
        """
        if num_byzantine < 0:
            raise ValueError(f"num_byzantine = {num_byzantine}: must be >= 0")
        if updates < self.least(num_byzantine):
            raise ValueError(
                f"num_byzantine = {num_byzantine} with {updates} updates: must be such that there "
                f"are at least {self.factor} num_byzantine + {self.more} = "
                f"{self.least(num_byzantine)}; use at most {self.bearable(updates)}"
            )


MAJORITY = Bound(2, 1)  # half of them and one
KRUM = Bound(2, 3)  # Blanchard et al. 2017: 2 f + 2 < n
BULYAN = Bound(4, 3)  # El Mhamdi, Guerraoui and Rouault 2018
