"""`python -m training`: make the cohort, fine-tune, train the demo's weights."""

from __future__ import annotations

import sys

from training.cli import app
from training.errors import TrainingError


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 1."""
    try:
        app()
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    main()
