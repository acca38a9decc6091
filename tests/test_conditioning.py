"""What a network is told: from what a caller says to the rows of both passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import sampling
from sparse_engine.conditioning import Condition, Conditioning, class_condition, is_condition, read_conditioning
from sparse_engine.errors import InputError, OptionError

CONTEXT = Condition("context", (3, 2), mask="context_mask")
MASK = Condition("context_mask", (3,), default=1.0, null="ones")
IDS = Condition("time_ids", (2,), null="same")
LABELS = class_condition(11, 10)[0]
ROW = np.arange(6, dtype=np.float32).reshape(3, 2)
ROWS = np.stack([ROW, ROW + 10, ROW + 20, ROW + 30])
IDS_ROW = np.array([7.0, 8.0], np.float32)


def rows(*conditions: Condition, nulls: dict[str, np.ndarray] | None = None, n: int = 4, **said: Any) -> Any:
    return Conditioning(conditions, nulls).rows(n, **said)


def test_a_row_for_all_and_a_row_each_are_told_in_the_order_of_the_conditions() -> None:
    found = rows(CONTEXT, MASK, IDS, conditioning={"time_ids": IDS_ROW, "context": ROWS})
    assert list(found.arrays) == ["context", "context_mask", "time_ids"]
    assert np.array_equal(found.arrays["context"], ROWS[None])
    assert np.array_equal(found.arrays["context_mask"], np.ones((1, 4, 3), np.float32))
    assert np.array_equal(found.arrays["time_ids"], np.tile(IDS_ROW, (1, 4, 1)))
    assert np.array_equal(found.weights, [1.0])
    assert {name: array.dtype.name for name, array in found.arrays.items()} == dict.fromkeys(found.arrays, "float32")


def test_rows_of_some_images() -> None:
    found = rows(CONTEXT, MASK, conditioning={"context": ROWS}).of(np.array([2, 0])).arrays
    assert np.array_equal(found["context"], ROWS[None, [2, 0]])
    assert found["context"].flags.c_contiguous


def test_the_second_pass_is_told_what_the_caller_says_or_what_stands_for_none() -> None:
    null = np.full((3, 2), -1.0, np.float32)
    stored = Condition("context", (3, 2), null="stored")
    said = {"conditioning": {"context": ROWS, "time_ids": IDS_ROW}, "guidance": 3.0}
    found = rows(stored, MASK, IDS, nulls={"context": null}, **said)
    assert np.array_equal(found.weights, np.array([3.0, -2.0], np.float32))
    assert np.array_equal(found.arrays["context"][0], ROWS)
    assert np.array_equal(found.arrays["context"][1], np.stack([null] * 4))
    assert np.array_equal(found.arrays["time_ids"][1], found.arrays["time_ids"][0])
    negative = rows(stored, MASK, IDS, nulls={"context": null}, negative={"context": ROW}, **said)
    assert np.array_equal(negative.arrays["context"][1], np.stack([ROW] * 4))
    zeros = rows(Condition("pooled", (2,), null="zeros"), conditioning={"pooled": IDS_ROW}, guidance=2.0)
    assert np.array_equal(zeros.arrays["pooled"], np.stack([np.tile(IDS_ROW, (4, 1)), np.zeros((4, 2))]))


def test_a_shorter_context_is_filled_up_and_masked() -> None:
    found = rows(
        CONTEXT, MASK, conditioning={"context": ROWS[:, :2]}, negative={"context": ROW[:1]}, guidance=2.0
    ).arrays
    assert np.array_equal(found["context"][0], ROWS * [[1], [1], [0]])
    assert np.array_equal(found["context_mask"][0], np.tile([1.0, 1.0, 0.0], (4, 1)))
    assert np.array_equal(found["context"][1], np.stack([ROW * [[1], [0], [0]]] * 4))
    assert np.array_equal(found["context_mask"][1], np.tile([1.0, 0.0, 0.0], (4, 1)))


def test_a_mask_that_is_said_is_taken_as_it_is() -> None:
    mask = np.array([True, False, True])
    found = rows(CONTEXT, MASK, conditioning={"context": ROW, "context_mask": mask}).arrays
    assert np.array_equal(found["context_mask"][0], np.tile([1.0, 0.0, 1.0], (4, 1)))


def test_labels_are_drawn_for_images_of_their_seeds_and_are_none_without() -> None:
    seeds, images = 3, np.array([5, 0, 9, 2])
    drawn = rows(LABELS, draw=(seeds, images)).arrays["y"]
    assert np.array_equal(drawn, sampling.labels(seeds, images, 10)[None])
    assert np.array_equal(rows(LABELS).arrays["y"], np.full((1, 4), 10))
    assert np.array_equal(rows(*class_condition(5)).arrays["y"], np.zeros((1, 4)))
    middle = rows(*class_condition(11, 4), draw=(seeds, np.arange(4))).arrays["y"]
    assert not np.any(middle == 4)


def test_labels_are_short_for_y() -> None:
    said = rows(LABELS, labels=[1, 2, 3, 4], guidance=2.0).arrays["y"]
    assert np.array_equal(said, [[1, 2, 3, 4], [10] * 4])
    assert np.array_equal(rows(LABELS, conditioning={"y": [1, 2, 3, 4]}).arrays["y"], said[:1])
    assert np.array_equal(rows(LABELS, labels=1, negative={"y": 7}, guidance=2.0).arrays["y"], [[1] * 4, [7] * 4])


@pytest.mark.parametrize(
    "conditions,said,message",
    [
        ((CONTEXT, MASK), {}, r"conditioning\['context'\] is missing.*float32 \[3, 2\] for all images, or \[4, 3, 2\]"),
        ((CONTEXT, MASK), {"conditioning": {"text": ROW}}, r"conditioning\['text'\].*it is told context, context_mask"),
        ((), {"conditioning": {"y": 1}}, r"conditioning\['y'\]: the model is not told that; it is told nothing"),
        ((CONTEXT, MASK), {"conditioning": ROW}, "conditioning = .*expected a mapping"),
        ((CONTEXT, MASK), {"conditioning": {"context": ROW.T}}, r"has shape \[2, 3\]; expected \[3, 2\] for all"),
        ((CONTEXT, MASK), {"conditioning": {"context": ROWS[:3]}}, r"has shape \[3, 3, 2\]; expected .*\[4, 3, 2\]"),
        (
            (CONTEXT, MASK),
            {"conditioning": {"context": np.zeros((4, 5, 2))}},
            r"(?s)shape \[4, 5, 2\].*engine's length is 3: cut it, or rebuild with --context-length 5",
        ),
        ((CONTEXT, MASK), {"conditioning": {"context": np.zeros((4, 0, 2))}}, r"has shape \[4, 0, 2\]"),
        ((Condition("c", (3, 2)),), {"conditioning": {"c": ROW[:2]}}, r"has shape \[2, 2\]"),
        ((CONTEXT, MASK), {"conditioning": {"context": ROW * np.nan}}, "NaN or infinite"),
        ((CONTEXT, MASK), {"conditioning": {"context": "a cat"}}, r"conditioning\['context'\] is no array of numbers"),
        ((Condition("n", (2,), "int64"),), {"conditioning": {"n": [0.5, 1]}}, "n'] is float64; expected integers"),
        ((LABELS,), {"conditioning": {"y": 11}}, "label 11 is out of range; the model has classes 0 to 10"),
        ((LABELS,), {"labels": 1, "conditioning": {"y": 2}}, "the same thing said twice"),
        ((LABELS,), {"negative": {"y": 1}}, "negative is given without guidance"),
        ((LABELS,), {"negative": {"y": [1, 2]}, "guidance": 2.0}, r"negative\['y'\] has shape \[2\]"),
        (class_condition(5), {"guidance": 2.0}, r"(?s)has no null class.*--null-class"),
        ((), {"guidance": 2.0}, "is told nothing"),
        ((), {"labels": 1}, "the model is unconditional"),
        ((CONTEXT, MASK), {"labels": 1, "conditioning": {"context": ROW}}, "told context, context_mask and no label"),
        (
            (CONTEXT, MASK),
            {"conditioning": {"context": ROW}, "guidance": 2.0},
            r"(?s)is told context and has no null for it.*pass negative=\{'context': array\}",
        ),
    ],
)
def test_what_cannot_be_told(conditions: tuple[Condition, ...], said: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rows(*conditions, **said)


def test_what_a_manifest_may_hold() -> None:
    assert all(is_condition(each.to_dict()) for each in (CONTEXT, MASK, IDS, LABELS))
    assert Condition(**{**CONTEXT.to_dict(), "shape": [3, 2]}) == CONTEXT


def test_a_file_of_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{"context": ROW, "negative/context": ROW + 1, "pooled": IDS_ROW})
    told, negative = read_conditioning(tmp_path / "x.npz")
    assert told.keys() == {"context", "pooled"}
    assert np.array_equal(negative["context"], ROW + 1)
    np.savez(tmp_path / "x.npz", context=np.array([{}], object))
    with pytest.raises(InputError, match=r"x\.npz is no \.npz file of arrays"):
        read_conditioning(tmp_path / "x.npz")
    with pytest.raises(InputError, match=r"(?s)none\.npz.*numpy\.savez"):
        read_conditioning(tmp_path / "none.npz")
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"x\.npz is no \.npz file of arrays"):
        read_conditioning(tmp_path / "x.npz")
