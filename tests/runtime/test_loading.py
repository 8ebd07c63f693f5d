"""What is loaded where, and what the user is told about it."""

from __future__ import annotations

import warnings

import pytest
from handiffuser import HanDiffuser
from handiffuser.runtime import loading


def test_a_gpu_that_is_left_out_is_said(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "DRIVER", tmp_path)
    with pytest.warns(RuntimeWarning, match=r"GPU of this machine is not used.*handiffuser\[cuda\].*--device cpu"):
        HanDiffuser.load(toy_bundle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HanDiffuser.load(toy_bundle, device="cpu")
        monkeypatch.setattr(loading, "DRIVER", tmp_path / "none")
        HanDiffuser.load(toy_bundle)
