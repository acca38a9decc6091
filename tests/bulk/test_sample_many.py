"""A folder of many images: whoever draws them and however often it is begun again, the same bytes."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine, tactics
from sparse_engine.bulk import Machines, Shard, finish, sample_many
from sparse_engine.bulk.draw import facts_of
from sparse_engine.bulk.job import Chunk
from sparse_engine.bulk.kernels import differences
from sparse_engine.bulk.lock import locked
from sparse_engine.cli.main import run
from sparse_engine.errors import InputError, OutputError

N, STEPS = 50, 2
ONE = Machines(threads=1)


@pytest.fixture(scope="module")
def expected(conditional_engine: Path) -> np.ndarray:
    with SparseEngine.load(conditional_engine, threads=1) as engine:
        return engine.sample(N, steps=STEPS, seed=7, labels=np.arange(N) % 4)


def draw(engine: Path, out: Path, **options: Any) -> Any:
    given = {"steps": STEPS, "seed": 7, "labels": "balanced", "machines": ONE, "chunk": 16, **options}
    return sample_many(engine, out, given.pop("n", N), **given)


def array(out: Path) -> np.ndarray:
    with np.load(out / "samples.npz") as found:
        np.testing.assert_array_equal(found["arr_1"], np.arange(N) % 4)
        return found["arr_0"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "chunks").glob("*.npz")}


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 7},
        {"chunk": 1000},
        {"machines": Machines(threads=1, batch_size=3)},
        {"machines": Machines(workers=2, threads=1)},
        {"machines": Machines(workers=1, batch_size=5)},
    ],
    ids=str,
)
def test_images_are_those_of_sample(
    conditional_engine: Path, tmp_path: Path, expected: np.ndarray, options: dict[str, Any]
) -> None:
    summary = draw(conditional_engine, tmp_path / "out", **options)
    assert (summary.images, summary.drawn, summary.finished) == (N, N, tmp_path / "out" / "samples.npz")
    np.testing.assert_array_equal(array(tmp_path / "out"), expected)
    assert sorted(os.listdir(tmp_path / "out")) == ["chunks", "job.json", "kernels.json", "samples.npz"]


def test_the_same_bytes_by_shards_by_processes_and_after_a_resume(conditional_engine: Path, tmp_path: Path) -> None:
    draw(conditional_engine, tmp_path / "one")
    for index in (2, 0, 1):
        summary = draw(conditional_engine, tmp_path / "shards", shard=Shard(index, 3))
        assert summary.finished is None
    draw(conditional_engine, tmp_path / "begun", machines=Machines(workers=2))
    chunks = tmp_path / "begun" / "chunks"
    (chunks / f"{Chunk(16, 32).name}.npz").unlink()
    whole = (chunks / f"{Chunk(32, 48).name}.npz").read_bytes()
    (chunks / f"{Chunk(32, 48).name}.npz").write_bytes(whole[: len(whole) // 2])  # as a copy that was cut off
    assert draw(conditional_engine, tmp_path / "begun", chunk=None).drawn == 32
    assert draw(conditional_engine, tmp_path / "begun").drawn == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "shards") == contents(tmp_path / "begun")
    finish(tmp_path / "shards")
    assert (tmp_path / "shards" / "samples.npz").read_bytes() == (tmp_path / "one" / "samples.npz").read_bytes()


def test_the_clock_is_in_no_byte(conditional_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(conditional_engine, tmp_path / "now")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: 1e9 - real() % 1000)  # years back, and running backwards
    draw(conditional_engine, tmp_path / "then")
    assert contents(tmp_path / "now") == contents(tmp_path / "then")
    assert draw(conditional_engine, tmp_path / "now").drawn == 0


def test_labels(conditional_engine: Path, tmp_path: Path) -> None:
    listed = np.random.default_rng(0).integers(0, 4, N)
    np.save(tmp_path / "labels.npy", listed)
    with SparseEngine.load(conditional_engine, threads=1) as engine:
        for name, labels, told in (
            ("drawn", None, None),
            ("repeated", [3, 1, 0], np.resize([3, 1, 0], N)),
            ("listed", tmp_path / "labels.npy", listed),
        ):
            draw(conditional_engine, tmp_path / name, labels=labels, guidance=1.5)
            with np.load(tmp_path / name / "samples.npz") as found:
                images = engine.sample(N, steps=STEPS, seed=7, labels=told, guidance=1.5)
                np.testing.assert_array_equal(found["arr_0"], images)
                if told is None:
                    assert set(found["arr_1"]) == {0, 1, 2, 3}  # 4 is the null class
                    told = found["arr_1"]
                    np.testing.assert_array_equal(
                        images, engine.sample(N, steps=STEPS, seed=7, labels=told, guidance=1.5)
                    )
                np.testing.assert_array_equal(found["arr_1"], told)
    listed[0] += 1
    np.save(tmp_path / "labels.npy", listed % 4)
    with pytest.raises(InputError, match="another job's: its labels is"):
        draw(conditional_engine, tmp_path / "listed", labels=tmp_path / "labels.npy", guidance=1.5)


def test_a_sidecar_says_who_drew_a_chunk(conditional_engine: Path, tmp_path: Path) -> None:
    draw(conditional_engine, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "chunks" / f"{Chunk(0, 16).name}.json").read_text())
    assert said["backend"] == "onnxruntime"
    assert said["pid"] == os.getpid()
    assert said["threads"] == 1
    with SparseEngine.load(conditional_engine, threads=1) as engine:
        assert said["layers"] == {layer["name"]: layer["kernel"] for layer in engine.info["layers"] if layer["kernel"]}


def test_another_job_is_refused_by_its_field(conditional_engine: Path, tiny_engine: Path, tmp_path: Path) -> None:
    draw(conditional_engine, tmp_path / "out")
    before = contents(tmp_path / "out")
    for field, options in {
        "seed": {"seed": 8},
        "n": {"n": N + 1},
        "chunk": {"chunk": 17},
        "steps": {"steps": 3},
        "options": {"options": {"t_end": 0.1}},
        "guidance": {"guidance": 2.0},
        "sampler": {"sampler": "ddim"},
    }.items():
        with pytest.raises(InputError, match=f"another job's: its {field} is .*, this command's "):
            draw(conditional_engine, tmp_path / "out", **options)
    with pytest.raises(InputError, match="another job's: its engine is"):
        draw(tiny_engine, tmp_path / "out", labels=None)
    assert contents(tmp_path / "out") == before


def test_other_kernels_are_refused_unless_machines_may_be_mixed(conditional_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw(conditional_engine, out, shard=Shard(0, 2))
    path = out / "kernels.json"
    said = json.loads(path.read_text())
    said["facts"]["processor"] = "an abacus"
    path.write_text(json.dumps(said))
    for machines in (ONE, Machines(workers=1)):
        with pytest.raises(InputError, match=r"begun with other kernels: processor was an abacus, here .*\n.*--mixed"):
            draw(conditional_engine, out, shard=Shard(1, 2), machines=machines)
    assert draw(conditional_engine, out, machines=Machines(threads=1, mixed=True)).images == N


def test_kernels_are_those_of_the_job_on_any_number_of_threads(
    conditional_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each process found other kernels to be the fastest: a cache of its own, and timings at random."""
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    slowest = lambda candidates: tactics.Choice(name := max(candidates), dict.fromkeys(candidates, 2.0) | {name: 1.0})  # noqa: E731
    monkeypatch.setattr(tactics, "fastest", slowest)
    draw(conditional_engine, out, shard=Shard(0, 2))
    first = json.loads((out / "kernels.json").read_text())
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "another"))
    quickest = lambda candidates: tactics.Choice(name := min(candidates), dict.fromkeys(candidates, 2.0) | {name: 1.0})  # noqa: E731
    monkeypatch.setattr(tactics, "fastest", quickest)
    draw(conditional_engine, out, shard=Shard(1, 2), machines=Machines(threads=2))
    drawn_by = json.loads((out / "chunks" / f"{Chunk(16, 32).name}.json").read_text())
    assert first["choices"]
    assert not differences(first["facts"], {name: drawn_by[name] for name in first["facts"]})
    (out / "chunks" / f"{Chunk(16, 32).name}.npz").unlink()
    with pytest.raises(InputError, match="begun with other kernels"):
        draw(conditional_engine, out, machines=Machines(threads=1, autotune=False))


def test_one_writer(conditional_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw(conditional_engine, out, shard=Shard(0, 2))
    with locked(out, Shard()):
        with pytest.raises(InputError, match=f"is held: process {os.getpid()} on .* writes there"):
            draw(conditional_engine, out)
        with pytest.raises(InputError, match="as shard 0-of-1"):
            draw(conditional_engine, out, shard=Shard(1, 2))
    draw(conditional_engine, out)


def test_a_lock_that_was_left_behind(conditional_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw(conditional_engine, out, shard=Shard(0, 2))
    lock = out / "lock.0-of-1"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom sparse_engine.bulk.job import Shard\n"
        "from sparse_engine.bulk.lock import locked\n"
        "with locked(Path(sys.argv[1]), Shard()):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", script, out]).returncode < 0
    assert lock.exists()
    assert draw(conditional_engine, out).images == N  # its process is no more
    lock.write_text(json.dumps({"host": "another", "pid": 1}))
    (out / "chunks" / f"{Chunk(0, 16).name}.npz").unlink()
    with pytest.raises(
        InputError, match=r"left by process 1 on another, and this process cannot tell.*\n.*--steal-lock"
    ):
        draw(conditional_engine, out)
    assert draw(conditional_engine, out, machines=Machines(threads=1, steal_lock=True)).drawn == 16
    assert not lock.exists()


LIMITED = """
import resource, sys
from sparse_engine.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
main()
"""


@pytest.mark.parametrize("workers", [[], ["--workers", "1"]], ids=["inline", "process"])
def test_a_disk_that_is_full_ends_it_and_it_goes_on_later(
    conditional_engine: Path, tmp_path: Path, workers: list[str]
) -> None:
    """The first chunk fits, the second does not."""
    command = ["sample-many", str(conditional_engine), "-n", "50", "--steps", "2", "--threads", "1", "--no-autotune"]
    command += ["--format", "none", "-o", str(tmp_path / "out"), *workers]
    small, large = [*command, "--chunk", "8"], [*command, "--chunk", "30"]
    for call, code in ((small, 0), (large, 2)):
        done = subprocess.run([sys.executable, "-P", "-c", LIMITED, *call], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        if code:
            assert "chunks/0000000000-0000000030.npz" in done.stderr
            assert "File too large" in done.stderr
            assert "Traceback" not in done.stderr
            assert not (tmp_path / "out").exists()
        else:
            assert len(contents(tmp_path / "out")) == 7
            for path in (tmp_path / "out" / "chunks").iterdir():
                path.unlink()
            (tmp_path / "out" / "chunks").rmdir()
            for name in ("job.json", "kernels.json"):
                (tmp_path / "out" / name).unlink()
            (tmp_path / "out").rmdir()


def test_a_full_disk_in_the_middle(
    conditional_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    from sparse_engine.bulk import chunks

    real, written = chunks.commit, []

    def full(out: Path, chunk: Chunk, *rest: Any) -> None:
        if len(written) == 2:
            raise OutputError(f"{out}: the disk is full; nothing was left behind", "free space, or write elsewhere")
        written.append(chunk)
        real(out, chunk, *rest)

    monkeypatch.setattr(chunks, "commit", full)
    with pytest.raises(InputError, match="the disk is full"):
        draw(conditional_engine, tmp_path / "out")
    monkeypatch.setattr(chunks, "commit", real)
    assert draw(conditional_engine, tmp_path / "out").drawn == N - 32
    np.testing.assert_array_equal(array(tmp_path / "out"), expected)


def test_a_chunk_that_keeps_failing_is_named_and_the_rest_is_there(
    conditional_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from sparse_engine.bulk import chunks

    real = chunks.commit

    def poisoned(out: Path, chunk: Chunk, *rest: Any) -> None:
        if chunk.first == 16:
            raise MemoryError("so it is said")
        real(out, chunk, *rest)

    monkeypatch.setattr(chunks, "commit", poisoned)
    call = ["sample-many", str(conditional_engine), "-n", "50", "--chunk", "16", "--steps", "2", "--threads", "1"]
    assert run([*call, "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "1 of 4 chunks failed three times: images 16-31; the last said: out of memory: so it is said" in said
    assert len(contents(tmp_path / "out")) == 3
    monkeypatch.setattr(chunks, "commit", real)
    assert run([*call, "-o", str(tmp_path / "out")]) == 0
    assert "50 images (16 drawn now" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--steps", "0"], "steps = 0; expected a whole number of 1 or more"),
        (["--sampler", "nosuch"], "sampler"),
        (["-n", "0"], "n = 0"),
        (["--chunk", "0"], "chunk = 0"),
        (["--seed", "-1"], "seed = -1"),
        (["--workers", "0"], "workers = 0"),
        (["--batch-size", "0"], "batch_size = 0"),
        (["--timeout", "0"], "timeout = 0"),
        (["--shard", "3"], "--shard '3': expected i/N"),
        (["--shard", "4/4"], "shards are counted from 0"),
        (["--format", "jpeg"], "format = 'jpeg'; expected one of npz, png, webdataset, parquet"),
        (["--labels", "9"], "label 9 is out of range; the model has classes 0 to 4"),
        (["--labels", "seven"], "'seven' is no class"),
        (["--labels", "missing.npy"], "missing.npy does not exist"),
        (["--conditioning", "missing.npz"], "missing.npz does not exist"),
        (["--prompt", "a cat"], "prompt is given, but the model"),
        (["--t-end", "5"], "t_end"),
        (["--device", "cuda:0,cuda:1"], "device = cuda:0,cuda:1 are several"),
        (["-o", "no/such/folder"], "the folder no/such does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_before_anything_is_written(
    conditional_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["sample-many", str(conditional_engine), "-n", "20", "-o", "out", *options]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_folder_with_other_things_in_it(conditional_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep this")
    with pytest.raises(OutputError, match="is there already and holds no job: mine.txt"):
        draw(conditional_engine, tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]
    (tmp_path / "mine.txt").rename(tmp_path / "job.json")
    with pytest.raises(InputError, match=r"job\.json is damaged"):
        draw(conditional_engine, tmp_path)


def test_a_job_that_was_altered(conditional_engine: Path, tmp_path: Path) -> None:
    draw(conditional_engine, tmp_path / "out")
    path = tmp_path / "out" / "job.json"
    said = json.loads(path.read_text())
    for altered in ({"n": "many"}, {"chunk": 0}, {"shape": [8, 8]}, {"shape": None}, {"output": "jpeg"}, {"n": True}):
        path.write_text(json.dumps(said | altered))
        with pytest.raises(InputError, match=r"job\.json was altered"):
            finish(tmp_path / "out")
    for other in ({"format": 2}, {"more": 1}):
        path.write_text(json.dumps(said | other))
        with pytest.raises(InputError, match=r"no job of this version.*\n.*the version that began it"):
            draw(conditional_engine, tmp_path / "out", chunk=None)


def test_labels_that_do_not_fit(conditional_engine: Path, tiny_engine: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.zeros(3, np.int64))
    with pytest.raises(InputError, match=rf"few\.npy holds \[3\] of int64; expected \[{N}\] whole numbers"):
        draw(conditional_engine, tmp_path / "out", labels=tmp_path / "few.npy")
    np.save(tmp_path / "wrong.npy", np.full(N, 77))
    with pytest.raises(InputError, match="label 77 is out of range"):
        draw(conditional_engine, tmp_path / "out", labels=tmp_path / "wrong.npy")
    with pytest.raises(InputError, match="the model is told none"):
        draw(tiny_engine, tmp_path / "out")


def test_a_row_of_conditioning_for_each_image(conditional_engine: Path, tmp_path: Path, expected: np.ndarray) -> None:
    np.savez(tmp_path / "rows.npz", y=np.arange(N) % 4)
    draw(conditional_engine, tmp_path / "out", labels=None, conditioning=tmp_path / "rows.npz")
    np.testing.assert_array_equal(array(tmp_path / "out"), expected)
    np.savez(tmp_path / "few.npz", y=np.arange(3))
    with pytest.raises(InputError, match=r"conditioning\['y'\] has 3 rows; expected one for all or 50"):
        draw(conditional_engine, tmp_path / "other", labels=None, conditioning=tmp_path / "few.npz")


def test_an_interrupt_leaves_whole_chunks_and_no_worker(conditional_engine: Path, tmp_path: Path) -> None:
    import signal

    command = [sys.executable, "-P", "-m", "sparse_engine", "sample-many", str(conditional_engine), "-n", "20000"]
    command += ["--chunk", "50", "--steps", "20", "--workers", "2", "--threads", "1", "-o", str(tmp_path / "out")]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    chunks = tmp_path / "out" / "chunks"
    deadline = time.monotonic() + 60
    while len(list(chunks.glob("*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert (driver.returncode, "interrupted" in said, "Traceback" in said) == (130, True, False), said
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert sorted(os.listdir(tmp_path / "out")) == ["chunks", "job.json", "kernels.json"]
    for path in chunks.glob("*.npz"):
        with np.load(path) as found:
            assert found["arr_0"].shape == (50, 8, 8, 3)


def test_engine_that_cannot_be_loaded_leaves_no_folder(
    conditional_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_engine.errors import UnsupportedError

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError("this machine has no such unit", "another")

    monkeypatch.setattr(SparseEngine, "load", refuse)
    with pytest.raises(InputError, match="no such unit"):
        draw(conditional_engine, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_latents_go_to_an_array(latent_engine: Path, tmp_path: Path) -> None:
    draw(latent_engine, tmp_path / "out", n=8, labels=3)
    with SparseEngine.load(latent_engine, threads=1) as engine, np.load(tmp_path / "out" / "samples.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], engine.sample(8, steps=STEPS, seed=7, labels=3, output="float"))


def test_progress_is_told(conditional_engine: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    draw(conditional_engine, tmp_path / "out", shard=Shard(0, 2))
    draw(conditional_engine, tmp_path / "out", tell=told.append)
    assert (told[-1].done, told[-1].total, told[-1].workers) == (N, N, 1)
    assert told[-1].left == pytest.approx(0, abs=1e-9)
    assert all(earlier.done <= later.done for earlier, later in pairwise(told))
    assert any(each.rate and each.left for each in told)


def test_facts_are_those_that_bits_depend_on(torch_engine: Path, conditional_engine: Path) -> None:
    for path in (torch_engine, conditional_engine):
        with SparseEngine.load(path, threads=1) as engine:
            facts = facts_of(engine)
            assert "threads" not in facts
            assert facts["processor"] == tactics.processor_name()
            assert facts["layers"]
            assert set(facts["attention"].values()) <= {"own", "onnxruntime", "fused", "plain"}
            assert facts["attention"]
            assert json.loads(json.dumps(facts)) == facts
            runtime = {"library": "torch 3", "device": "cuda:1", "gpu": "H100", "threads": 4, "attention": "plain"}
            engine._runner = SimpleNamespace(describe=lambda runtime=runtime: dict(runtime), close=lambda: None)
            on_gpu = facts_of(engine)
            assert (on_gpu["device"], on_gpu["gpu"], on_gpu["attention"]) == ("cuda", "H100", "plain")
            assert "processor" not in on_gpu


def test_differences_are_said_by_name() -> None:
    there = {"processor": "a", "layers": {"x": "dense", "y": "dense"}, "gone": 1}
    assert differences(there, there) == []
    assert differences(there, {"processor": "b", "layers": {"x": "t-lanes", "y": "n-lanes"}}) == [
        "processor was a, here b",
        "x ran dense, here t-lanes, and 1 more of its layers",
        "gone was 1, here None",
    ]
