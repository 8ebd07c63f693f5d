"""What is on its way through the loop on a GPU: requests in stage 1, and pictures that leave."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .device_pictures import DeviceBlend
from .device_sampler import DeviceJob
from .results import Work


@dataclass
class DeviceBatch:
    """Requests that go through stage 1 together; row i of every buffer belongs to works[i]."""

    works: list[Work]
    jobs: dict[Hashable, DeviceJob]  # of the hand prior
    done: Any  # event: keys and values are ready
    host: dict[str, np.ndarray]  # pinned copies of x and of the features, valid after `arrived`
    log: np.ndarray
    arrived: Any
    blends: dict[Hashable, DeviceBlend]  # of those that bring a picture
    left: int = 0  # works that have no result yet


@dataclass
class Exit:
    """Pictures on their way out."""

    jobs: list[DeviceJob]
    image: np.ndarray
    finite: np.ndarray
    log: np.ndarray
    event: Any = None
