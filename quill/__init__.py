"""quill: train, keep, sample, measure and hand on small GPTs by name."""

__version__ = "0.1.0"
