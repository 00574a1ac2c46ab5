"""`python -m training`: make the cohort, fine-tune, train the demo's weights."""

from __future__ import annotations

import logging
import sys

from rich.console import Console

from training.cli import app
from training.errors import TrainingError


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except TrainingError as error:
        stderr = Console(stderr=True, highlight=False)
        stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
