"""Calibration: lower precision done properly. What half precision costs, where it fails, and how that is mended.

inputs, pictures = record("bundle", PROMPTS)              # what every graph sees in a real run
report = fidelity("bundle", "bundle_fp16")                # graph by graph, and in the pictures
keep_sensitive("bundle", "bundle_fp16", "mixed", inputs)  # float32 where half does not hold
"""
