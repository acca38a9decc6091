"""What is damaged, how, and what has to hold of it: each ends well or in an error of ours."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import structure
import torch
from safetensors.torch import save_file

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import BuildOptions
from sparse_engine.bench.changes import compare_results
from sparse_engine.bench.results_file import read_comparison
from sparse_engine.calibration.collect import collect, load_calibration
from sparse_engine.conditioning import class_condition
from sparse_engine.export.build import build_engine
from sparse_engine.export.families.uvit import UViT, UViTConfig
from sparse_engine.export.model import load_model
from sparse_engine.export.options import ModelOptions
from sparse_engine.tactics import CACHE_VARIABLE

CONFIG = UViTConfig(8, 2, 3, 32, 2, 4, num_classes=5)
SEEDS = "seeds"  # the folder of the undamaged files
Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        file: the undamaged one; a case has the same name in a folder of its own.
        damages: of which a case takes one.
        use: reads a damaged file; gets its path and the folder of the undamaged ones.
        beside: what ``use`` puts beside it.
    """

    file: str
    damages: tuple[Damage, ...]
    use: Callable[[Path, Path], None]
    beside: tuple[str, ...] = ()


def make_seeds(folder: Path) -> None:
    """The undamaged files, small ones."""
    folder.mkdir()
    torch.manual_seed(0)
    state = {key: 0.15 * torch.randn_like(value) for key, value in UViT(CONFIG).state_dict().items()}
    torch.save(state, folder / "model.pth")
    save_file(state, folder / "model.safetensors")
    settings = {"family": "uvit", "heads": 4, "null_class": 4, "schedule": "vp-linear", "nnet": {"mlp_ratio": 4}}
    settings |= {"prediction": "eps", "sampler": "ddim", "value_range": [-1, 1], "num_classes": 5}
    (folder / "config.json").write_text(json.dumps(settings))
    told: dict[str, Any] = {"model": ModelOptions(heads=4, null_class=4), "options": BuildOptions(sparse=True)}
    build_engine(folder / "model.pth", folder / "model.sengine", **told)
    with SparseEngine.load(folder / "model.sengine", threads=1, autotune=False) as engine:
        collect(engine, images=16, steps=8).save(folder / "data.npz")
        np.save(folder / "sample.npy", _sample(engine))
    os.environ[CACHE_VARIABLE] = str(folder / "cache")
    SparseEngine.load(folder / "model.sengine", threads=1).close()
    stored = next((folder / "cache").glob("tactics-*.json"))
    (folder / "tactics.name").write_text(stored.name)
    stored.rename(folder / "tactics.json")
    measured = Path(__file__).parents[2] / "bench" / "results"
    shutil.copy(measured / "cpu-uvit-s-fp32.json", folder / "results.json")
    shutil.copy(measured / "cpu-grid-quick-fp32.json", folder / "grid.json")
    _make_shards(folder, state)


def _make_shards(folder: Path, state: dict[str, torch.Tensor]) -> None:
    names = list(state)
    where = {}
    for number, own in enumerate((names[::2], names[1::2]), 1):
        file = f"shards-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in own}, folder / file)
        where |= dict.fromkeys(own, file)
    (folder / "shards.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _sample(engine: SparseEngine) -> np.ndarray:
    return engine.sample(2, steps=1, labels=1, output="float")


def _use_checkpoint(path: Path, seeds: Path) -> None:
    load_model(path, heads=4, null_class=4)


def _use_configuration(path: Path, seeds: Path) -> None:
    checkpoint = path.with_name("model.pth")
    checkpoint.symlink_to(seeds / "model.pth")
    load_model(checkpoint)


def _use_engine(path: Path, seeds: Path) -> None:
    """A picture that comes out is the undamaged engine's."""
    with SparseEngine.load(path, threads=1, autotune=False) as engine:
        drawn = _sample(engine)
    if not np.array_equal(drawn, np.load(seeds / "sample.npy")):
        raise AssertionError("a picture from altered bytes")


def _use_manifest(path: Path, seeds: Path) -> None:
    """A manifest that somebody edited, its CRC right, may say something else; it must not break a reader."""
    with SparseEngine.load(path, threads=1, autotune=False) as engine:
        engine.sample(1, steps=1)


def _use_calibration(path: Path, seeds: Path) -> None:
    checkpoint = EngineFile(seeds / "model.sengine").manifest.checkpoint_sha256
    load_calibration(path, checkpoint_sha256=checkpoint, data_shape=(3, 8, 8), conditions=class_condition(5, 4))


def _use_index(path: Path, seeds: Path) -> None:
    """The shards lie beside the index, which moves to a folder of their own."""
    folder = path.parent / "cache"
    folder.mkdir()
    for shard in seeds.glob("shards-*.safetensors"):
        (folder / shard.name).symlink_to(shard)
    load_model(path.rename(folder / path.name), heads=4, null_class=4)


def _use_results(path: Path, seeds: Path) -> None:
    """As ``bench --compare-to`` does: an earlier run that was edited, against a whole one."""
    earlier = read_comparison(path)
    compare_results(earlier, read_comparison(seeds / path.name), 0.05)


def _use_tactics(path: Path, seeds: Path) -> None:
    """Costs time, never correctness: it has to load. The file lies where the cache looks for it."""
    os.environ[CACHE_VARIABLE] = str(path.parent / "cache")
    cache = path.parent / "cache"
    cache.mkdir()
    name = (seeds / "tactics.name").read_text()
    path.rename(cache / name)
    SparseEngine.load(seeds / "model.sengine", threads=1).close()


def engine_with_manifest(data: bytes, rng: random.Random) -> bytes:
    """An engine whose manifest was edited, all else in its place: the manifest is the last member."""
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream, "a") as archive:
        info = archive.getinfo("manifest.json")
        values = mutate.json_of(json.loads(archive.read(info)), rng)
        archive.start_dir = info.header_offset
        stream.truncate(info.header_offset)
        archive.filelist.remove(info)
        del archive.NameToInfo[info.filename]
        archive.writestr(zipfile.ZipInfo(info.filename), json.dumps(values))
    return stream.getvalue()


def _pickled(data: bytes, rng: random.Random) -> bytes:
    return mutate.pickle_of(data, rng, Path(structure.CANARY))


TARGETS: dict[str, Target] = {
    "pth": Target("model.pth", (mutate.bytes_of, mutate.zip_of, mutate.zip_of, _pickled), _use_checkpoint),
    "safetensors": Target("model.safetensors", (mutate.safetensors_of,), _use_checkpoint),
    "engine": Target("model.sengine", (mutate.bytes_of, mutate.zip_of), _use_engine),
    "manifest": Target("model.sengine", (engine_with_manifest,), _use_manifest),
    "calibration": Target("data.npz", (mutate.bytes_of, mutate.zip_of), _use_calibration),
    "results": Target("results.json", (mutate.text_of,), _use_results),
    "state": Target("model.pth", (structure.checkpoint_of,), _use_checkpoint),
    "pickle": Target("model.pth", (structure.pickle_in_zip,), _use_checkpoint),
    "described": Target("model.safetensors", (structure.described_safetensors,), _use_checkpoint),
    "index": Target("shards.safetensors.index.json", (mutate.text_of,), _use_index, ("cache",)),
    "zip": Target("model.sengine", (structure.zip_fields_of, structure.bomb_of), _use_engine),
    "pthzip": Target("model.pth", (structure.zip_fields_of, structure.bomb_of), _use_checkpoint),
    "npz": Target("data.npz", (structure.npz_of, structure.zip_fields_of, structure.bomb_of), _use_calibration),
    "grid": Target("grid.json", (mutate.text_of,), _use_results),
    "tactics": Target("tactics.json", (mutate.text_of,), _use_tactics, ("cache",)),
    "configuration": Target("config.json", (mutate.text_of,), _use_configuration, ("model.pth",)),
}


def damage(target: Target, seeds: Path, rng: random.Random) -> bytes:
    """The bytes of one case."""
    return rng.choice(target.damages)((seeds / target.file).read_bytes(), rng)


def written_beside(folder: Path, allowed: Any) -> list[str]:
    """What a case left in its folder that was not there."""
    return sorted(path.name for path in folder.iterdir() if path.name not in allowed)
