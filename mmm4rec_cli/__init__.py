"""mmm4rec: multi-modal sequential recommendation from raw logs to full-ranking metrics."""

__version__ = "0.1.0"
