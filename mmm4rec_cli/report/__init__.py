"""Figures and the HTML page of `mmm4rec report`."""
