"""The settings of a run, and reading and validating them."""
