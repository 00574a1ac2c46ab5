"""`python -m training`: make the cohort, fine-tune, train the demo's weights."""

from __future__ import annotations

import logging

from gigapath_contract.command_line import call, run
from training.cli import app
from training.errors import TrainingError


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run(lambda: call(app), TrainingError)


if __name__ == "__main__":
    main()
