"""What models ask of a sample's shape. Needs nothing."""

from fedsim.basics.errors import ScenarioError


def image_shape(model: str, feature_shape: tuple[int, ...], least: int) -> tuple[int, int, int]:
    """Return (channels, height, width) of images.

    Args:
        model: The model's scenario name.
        feature_shape: Shape of one sample.
        least: Smallest height and width.

    Raises:
        ScenarioError: If the features are no images, or too small ones.
    """
    if len(feature_shape) != 3 or min(feature_shape[1:]) < least:
        raise ScenarioError(
            f"[task] model = '{model}': needs images (channels, height, width) of at least "
            f"{least}x{least}, the data set's features have shape {feature_shape}"
        )
    channels, height, width = feature_shape
    return channels, height, width
