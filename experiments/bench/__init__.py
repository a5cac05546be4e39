"""The project's figures, each against the thing that it is to be compared with, both in one run."""
