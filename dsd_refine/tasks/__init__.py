"""The tasks: one file each, named like the task. `registry` lists them."""
