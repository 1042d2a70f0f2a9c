"""Launcher for a checkout: `python cli.py …` and `accelerate launch cli.py …` are the command `dsd-refine …`."""

from dsd_refine.cli.app import main

if __name__ == "__main__":
    main()
