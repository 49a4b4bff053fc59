"""What one sample looks like: all that a task needs to know of the data. Needs nothing."""

from typing import NamedTuple


class SampleSpec(NamedTuple):
    """Shapes and kinds of one sample's features and target.

    Attributes:
        feature_shape: Shape of the features.
        num_classes: C, when the target is a class from 0 to C-1; 0 when it is numbers.
        target_shape: Shape of a target of numbers, () for one number; () for a class.
        vocabulary: V, when the features are tokens from 0 to V-1 (int64); 0 when they are numbers.
    """

    feature_shape: tuple[int, ...]
    num_classes: int
    target_shape: tuple[int, ...] = ()
    vocabulary: int = 0

    @property
    def has_classes(self) -> bool:
        """Whether the target is a class."""
        return self.num_classes > 0
