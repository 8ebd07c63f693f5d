"""Datasets: the sample format, how it is read, checked, looked at, converted to, and its cached latents; `hd-data`."""
