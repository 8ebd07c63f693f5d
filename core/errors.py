"""The errors of the toolkit. Each message says what happened and what to do about it."""

from __future__ import annotations


class HanDiffuserError(Exception):
    """Something the user can mend: a bad file, a bad setting, a missing package.

    The commands print the message alone and exit with 1; from Python it is an ordinary exception.
    """


class CheckpointError(HanDiffuserError):
    """A checkpoint folder is incomplete, unsafe or does not fit together."""


class BundleError(HanDiffuserError):
    """A bundle is missing, damaged, or of a format this version does not read."""


class ExportError(HanDiffuserError):
    """A stage could not be exported, or its graph is not close enough to PyTorch."""


class RequestError(HanDiffuserError):
    """One request (a prompt and its settings) cannot be run; others are not affected.

    `field` names the setting that is wrong, such as "steps", or is None where no single one is.
    """

    def __init__(self, sentence: str, field: str | None = None) -> None:
        super().__init__(sentence)
        self.field = field


class EngineError(HanDiffuserError):
    """An engine was given something it does not accept, or its backend is missing or broken."""


class TrainingError(HanDiffuserError):
    """Training cannot begin, go on or be saved as it was asked to."""


class DatasetError(HanDiffuserError):
    """A dataset folder is missing, empty, or cannot be written."""


class EvaluationError(HanDiffuserError):
    """Pictures cannot be judged as asked: a package, a file or a folder is missing or unfit."""
