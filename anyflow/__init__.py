"""anyflow: any-step video generators, trained and fine-tuned."""

__version__ = "0.1.0"
