"""`python -m dsd_refine` is the command."""

from dsd_refine.app import main

if __name__ == "__main__":
    main()
