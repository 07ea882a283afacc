"""What all commands that train do alike."""

import logging

from fastformer.training.run import quieten


def test_the_terminal_is_left_to_progress_and_warnings() -> None:
    quieten()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(f"{name}.utilities")
        assert logger.isEnabledFor(logging.WARNING) and not logger.isEnabledFor(logging.INFO)
