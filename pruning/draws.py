"""What training draws, as a function of (seed, step, sample): the same on one process or eight, before or after a stop.

The generator is that of ``sampling.noise``, Philox4x32-10, whose counters it shares: the last word says what is drawn.

    (sample, step, 0, 2)  the time, whether the condition is dropped, whether the image is flipped, which context
    (row, epoch, 0, 3)    the order of an epoch: rows sorted by their two first words
    (0, 0, 0, 4)          the keys of two streams of normals, for the noise and for latents drawn from their moments

``sample`` is a sample's place in the whole batch of a step, whichever process works on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparse_engine import arguments, sampling
from sparse_engine.sampling import DiscreteBetas, Schedule
from sparse_engine.sampling.noise import SeededNoise

_WORD = 1 << 32
_OF_A_SAMPLE, _OF_A_ROW, _KEYS = 2, 3, 4


@dataclass(frozen=True)
class SampleDraws:
    """What some samples of a step drew, each [B].

    Attributes:
        uniform: float64 in [0, 1), for the time.
        dropped: float64 in [0, 1): the condition is dropped where it is below the rate.
        flipped: bool.
        choice: float64 in [0, 1), for one of an image's contexts.
    """

    uniform: np.ndarray
    dropped: np.ndarray
    flipped: np.ndarray
    choice: np.ndarray


class Draws:
    """The draws of one training.

    Args:
        seed: 0 <= seed < 2^64.
        rows: of the data set.
        batch: samples of a step, over all processes.
    """

    def __init__(self, seed: int, rows: int, batch: int) -> None:
        seed = arguments.seed(seed)
        self._key = (seed % _WORD, seed >> 32)
        self._rows, self._batch = rows, batch
        words = sampling.philox4x32([0, 0, 0, _KEYS], self._key).tolist()
        self._noise_seed, self._latent_seed = words[0] | words[1] << 32, words[2] | words[3] << 32
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def rows(self, step: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which rows of the data set: every row once an epoch, in an order of its own. samples: [B]."""
        places = step * self._batch + samples
        epochs = places // self._rows
        found = np.empty(len(samples), np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            found[mine] = self._ordered(epoch)[places[mine] % self._rows]
        return found

    def _ordered(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            rows = np.arange(self._rows)
            words = sampling.philox4x32([rows, rows * 0 + epoch, rows * 0, rows * 0 + _OF_A_ROW], self._key)
            self._order = np.lexsort((words[1], words[0]))
            self._epoch = epoch
        return self._order

    def of(self, step: int, samples: npt.NDArray[np.int64]) -> SampleDraws:
        """All else that is drawn for some samples [B] of a step, but for normals."""
        zeros = samples * 0
        words = sampling.philox4x32([samples, zeros + step, zeros, zeros + _OF_A_SAMPLE], self._key)
        uniform = words.astype(np.float64) / _WORD
        return SampleDraws(uniform[0], uniform[1], uniform[2] < 0.5, uniform[3])

    def noise(self, samples: npt.NDArray[np.int64], shape: tuple[int, ...]) -> SeededNoise:
        """The noise of some samples: a function of the step, float32 [B, *shape]."""
        return SeededNoise(self._noise_seed, samples, shape)

    def latent_noise(self, step: int, samples: npt.NDArray[np.int64], shape: tuple[int, ...]) -> np.ndarray:
        """What latents are drawn from their moments with, float32 [B, *shape]."""
        return sampling.normal(self._latent_seed, samples, step, shape)


def times(schedule: Schedule, uniform: np.ndarray) -> np.ndarray:
    """Schedule times of numbers in [0, 1): of a chain of N steps one of n / N, n = 1..N, else up to the schedule's end.

    float64 [B].
    """
    if isinstance(schedule, DiscreteBetas):
        return (np.floor(uniform * schedule.steps) + 1) / schedule.steps
    return uniform * schedule.t_max
