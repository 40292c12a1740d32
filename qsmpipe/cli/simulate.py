"""``qsmpipe simulate``: write an example dataset."""

from collections.abc import Sequence
from pathlib import Path

from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.words import Parser


def main(words: Sequence[str]) -> Exit:
    """Write an example dataset and say where it is."""
    from qsmpipe import examples

    parser = Parser(
        prog="qsmpipe simulate", description="Simulate a BIDS dataset of a head with known truth."
    )
    parser.add_argument("recipe", help=f"one of {', '.join(examples.RECIPES)}, or a TOML file")
    parser.add_argument("output_dir", type=Path)
    given = parser.parse(words)
    try:
        examples.write(given.recipe, given.output_dir)
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    except OSError as error:
        raise RunError(Exit.CANNOT_CREATE, str(error)) from error
    print(f"{given.recipe}: a BIDS dataset in {given.output_dir}, its truth in derivatives/truth")
    return Exit.OK
