"""The command line. Only this room sets environment variables and process state."""
