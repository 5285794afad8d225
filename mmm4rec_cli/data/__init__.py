"""From raw files to interactions, items and users."""
