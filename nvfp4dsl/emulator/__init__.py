"""Executes compiled PTX, with the launch its own host code makes, on a machine with no GPU."""
