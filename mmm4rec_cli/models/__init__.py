"""Models that turn histories into user vectors and score the catalogue."""
