import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from sparse_engine.errors import OptionError
from sparse_engine.sampling import labels, normal, philox4x32
from sparse_engine.sampling.noise import SeededNoise

# philox4x32-10 in Random123's kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = _words(key)
    assert philox4x32(_words(counter), (k0, k1)).tolist() == _words(expected)


def test_philox_works_on_many_counters_at_once() -> None:
    counters = np.array([_words(counter) for counter, _, _ in KNOWN_ANSWERS]).T
    found = philox4x32(counters, (0, 0))
    assert found[:, 0].tolist() == _words(KNOWN_ANSWERS[0][2])
    assert found[:, 1].tolist() == philox4x32(counters[:, 1], (0, 0)).tolist()


def _reference(seed: int, image: int, draw: int, count: int) -> np.ndarray:
    """One image's noise by the definition, in Python integers and floats."""
    values = []
    for block in range(-(-count // 4)):
        words = philox4x32([block, draw, image, 0], (seed % 2**32, seed >> 32)).tolist()
        for radius, angle in ((words[0], words[1]), (words[2], words[3])):
            r = math.sqrt(-2.0 * math.log(((radius >> 8) + 1) / 2**24))
            signed = angle - 2**32 if angle >= 2**31 else angle
            a = math.pi * (signed >> 8) / 2**23
            values += [r * math.cos(a), r * math.sin(a)]
    return np.array(values[:count])


@pytest.mark.parametrize("seed, image, draw", [(0, 0, 0), (2**64 - 1, 2**32 - 1, 1000), (2**32, 7, 1)])
def test_normal_follows_its_definition_to_1e_6(seed: int, image: int, draw: int) -> None:
    found = normal(seed, [image], draw, (3, 50, 37))[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.ravel(), _reference(seed, image, draw, 3 * 50 * 37), rtol=0, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch() -> None:
    shape = (3, 32, 32)
    together = normal(5, np.arange(70), 2, shape)  # more than one chunk of counters
    for image in (0, 1, 42, 43, 69):
        np.testing.assert_array_equal(normal(5, [image], 2, shape)[0], together[image])
    np.testing.assert_array_equal(normal(5, [69, 3, 3], 2, shape), together[[69, 3, 3]])


def test_a_seeds_noise_as_a_function_of_the_draw() -> None:
    noise = SeededNoise(2**40 + 3, np.array([4, 2**32 - 1, 9]), (3, 5))
    np.testing.assert_array_equal(noise(6), normal(2**40 + 3, [4, 2**32 - 1, 9], 6, (3, 5)))
    np.testing.assert_array_equal(noise.of(slice(1, 3))(6), noise(6)[1:])
    np.testing.assert_array_equal(noise.of(np.array([2, 2]))(6), noise(6)[[2, 2]])
    assert noise.origin.tolist() == [[3, 2**8, 4], [3, 2**8, 2**32 - 1], [3, 2**8, 9]]
    assert noise.origin.dtype == np.uint32


def test_seeds_images_and_draws_are_independent() -> None:
    shape = (4, 64, 64)
    a = normal(1, [0], 0, shape).ravel()
    others = [normal(2, [0], 0, shape), normal(1, [1], 0, shape), normal(1, [0], 1, shape)]
    others.append(normal(1 + 2**32, [0], 0, shape))
    for other in others:
        assert abs(np.corrcoef(a, other.ravel())[0, 1]) < 5 / math.sqrt(a.size)


def test_moments_and_tails_are_those_of_a_normal_distribution() -> None:
    x = normal(11, np.arange(100), 0, (3, 64, 64)).astype(np.float64).ravel()
    n = x.size
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for limit in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(limit / math.sqrt(2))
        assert abs((np.abs(x) > limit).mean() - share) < 5 * math.sqrt(share / n)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(n)


def test_labels_have_counters_of_their_own() -> None:
    words = [int(philox4x32([0, 0, image, 1], (9, 0))[0]) for image in range(50)]
    assert labels(9, np.arange(50), 1000).tolist() == [word * 1000 >> 32 for word in words]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 1, 1), (3, 7, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    found = normal(3, [4, 5], 0, shape)
    assert found.shape == (2, *shape)
    np.testing.assert_array_equal(found.reshape(2, -1)[:, 0], normal(3, [4, 5], 0, (8,))[:, 0])


def test_no_images() -> None:
    assert normal(3, [], 0, (3, 4, 4)).shape == (0, 3, 4, 4)
    assert labels(3, [], 10).shape == (0,)


def test_labels_are_uniform_and_do_not_depend_on_their_batch() -> None:
    found = labels(9, np.arange(20000), 10)
    assert found.dtype == np.int64
    counts = np.bincount(found, minlength=10)
    assert len(counts) == 10
    assert np.all(np.abs(counts - 2000) < 5 * math.sqrt(2000))
    assert labels(9, [1234], 10)[0] == found[1234]
    assert labels(9, [1234, 7], 1).tolist() == [0, 0]
    assert not np.array_equal(labels(10, np.arange(20), 10), found[:20])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: normal(-1, [0], 0, (3,)), "seed = -1"),
        (lambda: normal(2**64, [0], 0, (3,)), "seed = 18446744073709551616"),
        (lambda: normal(cast(Any, 1.5), [0], 0, (3,)), "seed = 1.5"),
        (lambda: normal(0, [-1], 0, (3,)), "images runs from -1 to -1"),
        (lambda: normal(0, [2**32], 0, (3,)), "expected 0 <= image < 2\\^32"),
        (lambda: normal(0, [0.5], 0, (3,)), "float64, expected \\[B\\] of integers"),
        (lambda: normal(0, 3, 0, (3,)), "images has shape \\(\\)"),
        (lambda: normal(0, [0], -1, (3,)), "draw = -1"),
        (lambda: labels(0, [0], 0), "num_classes = 0"),
    ],
)
def test_what_the_counter_cannot_hold_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_rows_of_seeds_of_their_own() -> None:
    seeds, images = np.array([7, 2**64 - 1, 7, 0], np.uint64), np.array([3, 0, 2**32 - 1, 3])
    for draw in (0, 9):
        found = normal(seeds, images, draw, (3, 5, 7))
        alone = [normal(int(seed), [image], draw, (3, 5, 7)) for seed, image in zip(seeds, images, strict=True)]
        np.testing.assert_array_equal(found, np.concatenate(alone))
    drawn = labels(seeds, images, 1000)
    each = [labels(int(seed), [image], 1000)[0] for seed, image in zip(seeds, images, strict=True)]
    assert drawn.tolist() == each
    noise = SeededNoise(seeds, images, (2, 3))
    np.testing.assert_array_equal(noise.of(np.array([1, 3]))(4), normal(seeds[[1, 3]], images[[1, 3]], 4, (2, 3)))
    assert noise.origin.tolist()[1] == [2**32 - 1, 2**32 - 1, 0]


def test_more_rows_than_are_worked_on_at_once() -> None:
    """Each chunk takes its own seeds."""
    seeds = np.arange(40, dtype=np.uint64)
    found = normal(seeds, np.zeros(40, int), 0, (3, 64, 64))
    np.testing.assert_array_equal(found[39:], normal(39, [0], 0, (3, 64, 64)))
