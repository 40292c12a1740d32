"""Recipes of the papers, a TOML file each; their names are read without torch."""

from importlib import resources

RECIPES = resources.files(__name__)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    names = (path.name for path in RECIPES.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))
