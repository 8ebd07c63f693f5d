"""How good the hands are: detectors, distances between sets of pictures, reports, and preference pages; `hd-eval`."""
