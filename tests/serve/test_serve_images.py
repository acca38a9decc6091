"""The pictures that a service sends are those of ``engine.sample``, however they were drawn together."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.export.assets import AssetOptions
from sparse_engine.export.families.uvit_t2i import UViTT2I, UViTT2IConfig
from tests.clip import save_text_model, save_tokenizer
from tests.conftest import save_network
from tests.serving import FAST, IMAGES, JSON, Client, load, picture, serving


@pytest.fixture(scope="module")
def reference(conditional_engine: Path) -> Iterator[SparseEngine]:
    with load(conditional_engine) as engine:
        yield engine


def test_images_of_a_seed(client: Client, reference: SparseEngine) -> None:
    answer = client.draw(n=3, seed=7, labels=[1, 0, 3], guidance=2)
    np.testing.assert_array_equal(
        answer.pictures(), reference.sample(3, seed=7, labels=[1, 0, 3], guidance=2.0, **FAST)
    )
    found = answer.json()
    assert [(each["seed"], each["index"], each["label"]) for each in found["data"]] == [(7, 0, 1), (7, 1, 0), (7, 2, 3)]
    assert (found["model"], found["steps"], found["sampler"]) == ("conditional", 3, "dpm-solver++")
    assert found["created"] > 1_700_000_000


def test_what_was_drawn_by_chance_can_be_drawn_again(client: Client, reference: SparseEngine) -> None:
    answer = client.draw(n=2)
    again = [
        reference.sample(1, seed=each["seed"], first=each["index"], labels=each["label"], **FAST)
        for each in answer.json()["data"]
    ]
    np.testing.assert_array_equal(answer.pictures(), np.concatenate(again))
    assert client.draw(n=1).json()["data"][0]["seed"] != answer.json()["data"][0]["seed"]
    assert answer.json()["data"][0]["seed"] < 2**53


def test_seeds_of_each_image_and_a_first(client: Client, reference: SparseEngine) -> None:
    seeds = [2**64 - 1, 5, 5]
    answer = client.draw(n=3, seed=seeds, first=4)
    np.testing.assert_array_equal(answer.pictures(), reference.sample(3, seed=seeds, first=4, **FAST))
    assert [each["index"] for each in answer.json()["data"]] == [4, 4, 4]


@pytest.mark.parametrize("options", [{}, {"sampler": "euler-sde"}, {"sampler": "ddim", "options": {"eta": 0.5}}])
def test_more_images_than_a_batch_holds(client: Client, reference: SparseEngine, options: dict[str, Any]) -> None:
    answer = client.draw(n=19, seed=1, **options)
    expected = FAST | {key: value for key, value in options.items() if key != "options"} | options.get("options", {})
    np.testing.assert_array_equal(answer.pictures(), reference.sample(19, seed=1, **expected))


def test_requests_of_many_are_drawn_together_and_each_gets_its_own(client: Client, reference: SparseEngine) -> None:
    batches = client.metric("sparse_engine_batch_images_count")
    asked = [
        {"n": 1 + k % 3, "seed": k, "labels": k % 4, "steps": 3 + k % 2, "guidance": 1.0 + k % 2} for k in range(48)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda fields: client.draw(**fields), asked))
    for fields, answer in zip(asked, answers, strict=True):
        options = FAST | {key: value for key, value in fields.items() if key != "n"}
        np.testing.assert_array_equal(answer.pictures(), reference.sample(fields["n"], **options))
    assert client.metric("sparse_engine_batch_images_count") - batches < 48


def test_one_image_as_bytes(client: Client, reference: SparseEngine) -> None:
    expected = reference.sample(1, seed=3, labels=2, **FAST)[0]
    for kind in ("image/png", "application/x-npy"):
        answer = client.draw({"Accept": kind}, seed=3, labels=2)
        assert answer.headers["content-type"] == kind
        assert [answer.headers[f"x-sparse-engine-{name}"] for name in ("seed", "index", "label")] == ["3", "0", "2"]
        found = picture(answer.body) if kind == "image/png" else np.load(io.BytesIO(answer.body))
        np.testing.assert_array_equal(found, expected)


def test_batches_are_filled_up_to_recorded_sizes(conditional_engine: Path, reference: SparseEngine) -> None:
    with serving(conditional_engine, max_batch=8, batch_sizes=(2, 8)) as client:
        answer = client.draw(n=5, seed=2)
        np.testing.assert_array_equal(answer.pictures(), reference.sample(5, seed=2, **FAST))
        assert client.metric("sparse_engine_padded_images_total") == 3
        assert client.metric("sparse_engine_images_total") == 5


def test_two_engines(conditional_engine: Path, tiny_engine: Path) -> None:
    with serving(conditional_engine, tiny_engine) as client, load(tiny_engine) as tiny:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["conditional", "tiny"]
        answer = client.draw(model="tiny", n=2, seed=1, prompt="")
        np.testing.assert_array_equal(answer.pictures(), tiny.sample(2, seed=1, **FAST))
        assert [each["label"] for each in answer.json()["data"]] == [None, None]
        assert client.draw(n=1).error["code"] == "missing_model"


def test_latents_are_arrays(latent_engine: Path) -> None:
    with serving(latent_engine) as client, load(latent_engine) as engine:
        answer = client.draw({"Accept": "application/x-npy"}, seed=1, labels=2)
        expected = engine.sample(1, seed=1, labels=2, output="float", **FAST)[0]
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.body)), expected)
        assert client.draw(seed=1).error["code"] == "no_pixels"
        assert client.get("/v1/models").json()["data"][0]["pixels"] is False


def test_texts(tmp_path: Path, build: Callable[..., Path]) -> None:
    encoder = save_tokenizer(tmp_path / "clip")
    save_text_model(encoder)
    config = UViTT2IConfig(8, 2, 3, 32, 2, 4, context_dim=16, context_length=77)
    checkpoint = save_network(tmp_path / "t2i.pth", UViTT2I(config))
    path = build(checkpoint, context_length=77, assets=AssetOptions(text_encoder=encoder))
    with serving(path) as client, load(path) as engine:
        texts = ["a cat", "the dog"]
        with ThreadPoolExecutor(3) as pool:
            both, one, plain = pool.map(
                lambda fields: client.draw(**fields),
                [
                    {"n": 2, "prompt": texts, "seed": 1, "guidance": 3},
                    {"prompt": "a cat", "negative_prompt": "the dog", "seed": 2, "guidance": 3},
                    {"prompt": "", "seed": 3},
                ],
            )
        expected = engine.sample(2, prompt=texts, seed=1, guidance=3, **FAST)
        np.testing.assert_array_equal(both.pictures(), expected)
        expected = engine.sample(1, prompt="a cat", negative_prompt="the dog", seed=2, guidance=3, **FAST)
        np.testing.assert_array_equal(one.pictures(), expected)
        np.testing.assert_array_equal(plain.pictures(), engine.sample(1, prompt="", seed=3, **FAST))
        assert "conditioning['context'] is missing" in client.draw(seed=1).error["message"]


def test_an_image_that_diverges_does_not_take_others_with_it(conditional_engine: Path, reference: SparseEngine) -> None:
    def spoiled(path: Path) -> SparseEngine:
        engine = load(path)
        drawn = engine.sample

        def sample(n: int, **options: Any) -> np.ndarray:
            x = drawn(n, **options)
            if "seed" in options:
                x[options["seed"] == 666] = np.nan
            return x

        engine.sample = sample  # type: ignore[method-assign]
        return engine

    with serving(conditional_engine, load=spoiled, max_wait=0.2) as client, ThreadPoolExecutor(2) as pool:
        good, bad = pool.map(lambda seed: client.draw(n=2, seed=seed), ([1, 2], [3, 666]))
        assert client.metric("sparse_engine_batch_images_count") == 1
    np.testing.assert_array_equal(good.pictures(), reference.sample(2, seed=[1, 2], **FAST))
    assert (bad.status, bad.error["code"]) == (500, "non_finite")
    assert "1 of 2 images became NaN" in bad.error["message"]


def test_openais_own_fields(client: Client) -> None:
    asked = {"model": "conditional", "prompt": "", "n": 1, "size": "8x8", "response_format": "b64_json", "user": "me"}
    assert client.draw(**asked, quality="auto", background="auto", output_format="png").status == 200
    assert client.ask("POST", IMAGES, json.dumps(asked | FAST | {"n": None}).encode(), JSON).status == 200
