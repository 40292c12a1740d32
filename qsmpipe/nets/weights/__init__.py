"""Weights that come with qsmpipe, each with its card; their names are read without torch."""

from importlib import resources

WEIGHTS = resources.files(__name__)

WEIGHTS_SUFFIX, CARD_SUFFIX = ".safetensors", ".toml"


def weights_names() -> list[str]:
    """Names of the weights that come with the package."""
    names = (path.name for path in WEIGHTS.iterdir())
    return sorted(name.removesuffix(CARD_SUFFIX) for name in names if name.endswith(CARD_SUFFIX))
