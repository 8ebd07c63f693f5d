"""Measures how good hands in pictures are: detectors, distances, reports and preference pages. `hd-eval` runs them."""
