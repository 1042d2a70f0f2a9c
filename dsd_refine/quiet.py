"""Quiet libraries: errors only. Light: this is called before they are imported."""

from __future__ import annotations

import logging
import warnings

LIBRARIES = ("timm", "datasets", "transformers", "huggingface_hub", "accelerate", "torch.distributed")


def quiet_libraries() -> None:
    """Let the libraries say errors only, and show no warning of theirs."""
    for name in LIBRARIES:
        level = logging.CRITICAL if name == "datasets" else logging.ERROR  # datasets raises what it logs
        logging.getLogger(name).setLevel(level)
    warnings.simplefilter("ignore")
