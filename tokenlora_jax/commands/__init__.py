"""The command-line programs: their flags, and the functions that they run."""
