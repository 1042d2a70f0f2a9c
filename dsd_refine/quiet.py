"""Let libraries report only errors. This module imports none of them, because it is used before they are."""

from __future__ import annotations

import logging
import warnings

LIBRARIES = ("timm", "datasets", "transformers", "huggingface_hub", "accelerate", "torch.distributed")


def quiet_libraries() -> None:
    """Let the libraries log only errors, and hide all warnings."""
    for name in LIBRARIES:
        level = logging.CRITICAL if name == "datasets" else logging.ERROR  # datasets also raises the errors that it logs
        logging.getLogger(name).setLevel(level)
    warnings.simplefilter("ignore")
