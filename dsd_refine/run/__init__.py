"""A run: opening it, its phases, its state on disk, and publishing."""
