"""Run the command with `python -m dsd_refine`."""

from __future__ import annotations

from dsd_refine.cli.app import main

if __name__ == "__main__":
    main()
