"""Hands of a given picture, painted again. `hd-repair` is the command; `plan` and `Patch` are the library."""
