"""Ranking the whole catalogue and measuring it."""
