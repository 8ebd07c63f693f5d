"""The errors of the toolkit. Each message says what happened and what to do about it."""

from __future__ import annotations


class HanDiffuserError(Exception):
    """Something the user can mend: a bad file, a bad setting, a missing package.

    Commands print the message alone and exit with 1. In Python it is an ordinary exception.
    """


class CheckpointError(HanDiffuserError):
    """A checkpoint folder is incomplete, unsafe or does not fit together."""


class BundleError(HanDiffuserError):
    """A bundle is missing or damaged, or this version does not read its format."""


class HubError(HanDiffuserError):
    """A model cannot be fetched from the Hub or pushed: missing, gated, unreachable, damaged, or too large."""


class ExportError(HanDiffuserError):
    """A stage cannot be exported, or its graph differs too much from PyTorch."""


class RequestError(HanDiffuserError):
    """One request (a prompt and its settings) cannot run. It does not affect others.

    `param` names the setting that is wrong, such as "steps", or is None where no single one is. `code` says in a word
    for programs what is wrong with it.
    """

    def __init__(self, sentence: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(sentence)
        self.param, self.code = param, code


class OutputError(HanDiffuserError):
    """Pictures cannot be written: the folder is read-only, full, in use by another run, or not a folder."""


class EngineError(HanDiffuserError):
    """An engine got a wrong input, or its backend is missing or broken."""


class TrainingError(HanDiffuserError):
    """Training cannot start, resume or save with these arguments."""


class DatasetError(HanDiffuserError):
    """A dataset folder is missing, empty, or cannot be written."""


class EvaluationError(HanDiffuserError):
    """Pictures cannot be judged: a package, a file or a folder is missing or unfit."""


class DetectionError(HanDiffuserError):
    """Hands cannot be found or fitted: the detector is missing, or a file of hands is unfit."""
