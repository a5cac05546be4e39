"""A causal model steered by hand, in a browser on this machine."""
