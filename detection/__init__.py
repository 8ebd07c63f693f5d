"""A picture becomes hands: detectors, their conventions, and the fit of SMPL-H hands to 21 points."""
