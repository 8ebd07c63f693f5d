"""Calibration: lower precision done properly. What half precision costs, where it fails, and how that is mended.

from handiffuser.calibration import fidelity, mixed, record

report = fidelity.fidelity("bundle", "bundle_fp16")             # graph by graph, and in the pictures
inputs, _ = record.record("bundle")                             # what every graph sees in a real run
mixed.keep_sensitive("bundle", "bundle_fp16", "mixed", inputs)  # float32 where half does not hold
"""
