"""``sparse-engine build``: checkpoint -> engine file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_engine.artifact import SUFFIX, EngineFile
from sparse_engine.backends import BuildOptions, TensorRTOptions, backend_named
from sparse_engine.backends.options import LINEAR_FORMS
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import EngineFileError, OptionError, UnsupportedError
from sparse_engine.files import check_writable, kept_if_done
from sparse_engine.manifest import Manifest

from .groups import grouped
from .options import Autotune, MaskLayers, Model
from .terminal import export_module, parse_globs, print_json, progress, tell

if TYPE_CHECKING:
    from sparse_engine.calibration.apply import Quantisation

WORKSPACES = (0.001, 1e6)  # GiB


def _tensorrt(text: str, *names: str) -> Any:
    """An option of the TensorRT backends, in a panel of their own."""
    return typer.Option(*names, help=text, rich_help_panel="TensorRT")


def _assets(text: str, *names: str) -> Any:
    """An option that puts something into the engine beside the network, in a panel of their own."""
    return typer.Option(*names, help=text, rich_help_panel="Beside the network")


def _quantisation(text: str, *names: str) -> Any:
    """An option of int8 and fp8 builds, in a panel of their own."""
    return typer.Option(*names, help=text, rich_help_panel="Quantisation")


@dataclass(frozen=True)
class Beside:
    """What is put into the engine beside the network."""

    null_context: Annotated[Path | None, _assets("A .npy that guidance takes for 'no context'.")] = None
    bundle: Annotated[bool, _assets("The text encoder and the decoder of the pipeline's own folder.", "--bundle")] = (
        False
    )
    text_encoder: Annotated[Path | None, _assets("A CLIP folder (transformers): prompts become contexts.")] = None
    vae: Annotated[Path | None, _assets("An AutoencoderKL folder (diffusers): latents become pictures.")] = None
    vae_scale: Annotated[float | None, _assets("What latents were multiplied by (default: the folder's).")] = None


@dataclass(frozen=True)
class TensorRT:
    """What the TensorRT backends alone are asked for."""

    linear: Annotated[str, _tensorrt("What a Linear becomes: auto, matmul, gemm or conv1x1.")] = "auto"
    static_batch: Annotated[bool, _tensorrt("Fix the batch at the usual one.", "--static-batch")] = False
    workspace: Annotated[float | None, _tensorrt("GiB that kernels may use (default: all there is).")] = None
    optimization_level: Annotated[int, _tensorrt("0 builds fast, 5 searches longest.")] = 3
    cache: Annotated[bool, _tensorrt("Keep timings and engines for the next build.", "--cache/--no-cache")] = True
    hardware_compatible: Annotated[bool, _tensorrt("Run on every GPU since Ampere.", "--hardware-compatible")] = False
    version_compatible: Annotated[bool, _tensorrt("Run on later TensorRT too.", "--version-compatible")] = False
    strip_weights: Annotated[bool, _tensorrt("Keep the weights beside the plan.", "--strip-weights")] = False
    compute_capabilities: Annotated[str | None, _tensorrt("GPUs a TensorRT for RTX plan is for: 8.6,12.0.")] = None

    def options(self) -> TensorRTOptions:
        """The same for a backend. Raises OptionError."""
        if self.linear not in LINEAR_FORMS:
            raise OptionError(f"--linear {self.linear!r} is not known; expected one of {', '.join(LINEAR_FORMS)}")
        if not 0 <= self.optimization_level <= 5:
            raise OptionError(f"--optimization-level {self.optimization_level}: expected 0 to 5")
        settled = {
            "workspace": _bytes(self.workspace),
            "compute_capabilities": tuple(parse_globs(self.compute_capabilities) or ()),
        }
        return TensorRTOptions(**{**vars(self), **settled})


@dataclass(frozen=True)
class Quantised:
    """How to quantise."""

    calib: Annotated[Path | None, _quantisation("What `sparse-engine calibrate` wrote; for int8, fp8 and auto.")] = None
    ranges: Annotated[str, _quantisation("How ranges are found: mse, max, percentile or entropy.")] = "mse"
    smooth: Annotated[float | None, _quantisation("SmoothQuant's strength, such as 0.5 (default: without).")] = None
    keep_float: Annotated[str | None, _quantisation("Layers to leave in float: globs, comma-separated.")] = None
    max_quality_loss: Annotated[
        float | None, _quantisation("Leave as many layers in float as keep the prediction within this, such as 0.02.")
    ] = None

    def options(self) -> Quantisation | None:
        """The same for a build. Raises OptionError where that is said, but not with what calibration data."""
        from sparse_engine.calibration.apply import Quantisation  # which loads onnx

        if self.calib is not None:
            kept = tuple(parse_globs(self.keep_float) or ())
            return Quantisation(self.calib, self.ranges, self.smooth, kept, self.max_quality_loss)
        if self != Quantised():
            raise OptionError(
                "--ranges, --smooth, --keep-float and --max-quality-loss need --calib",
                "sparse-engine calibrate CHECKPOINT",
            )
        return None


@dataclass(frozen=True)
class Wanted:
    """What a backend is asked for."""

    sparse: Annotated[bool, typer.Option("--sparse", help="Bake 2:4 masks and use sparse kernels.")] = False
    precision: Annotated[
        str, typer.Option(help="Of the network's products: fp32, tf32, bf16, fp16, int8, fp8 or auto.")
    ] = "fp32"
    batch: Annotated[str, typer.Option(help="MIN,USUAL,MAX batch.")] = "1,16,64"
    device: Annotated[str | None, typer.Option(help="Where it will run: cpu, cuda, cuda:1.")] = None
    require_sparse: Annotated[
        bool, typer.Option("--require-sparse", help="Fail where a masked layer gets no sparse kernel.")
    ] = False

    def options(self, tensorrt: TensorRTOptions, progress: Callable[[str], None]) -> BuildOptions:
        """The same for a backend, which tells ``progress`` each stage. Raises OptionError."""
        return BuildOptions(
            sparse=self.sparse,
            precision=self.precision,
            batch=_batch(self.batch),
            device=self.device,
            require_sparse=self.require_sparse,
            tensorrt=tensorrt,
            progress=progress,
        )


@dataclass(frozen=True)
class Masks:
    """How weights are masked."""

    mask: Annotated[
        str | None,
        typer.Option(help="auto, explicit, zeros, magnitude or none.", show_default="auto with --sparse, else none"),
    ] = None
    mask_layers: MaskLayers = None
    pattern: Annotated[str, typer.Option(help="N:M for the magnitude rule.")] = "2:4"

    def options(self) -> Any:
        """The same for ``export``. Raises OptionError."""
        pattern = export_module("masks").Pattern.parse(self.pattern)
        return export_module("options").MaskOptions(self.mask, pattern, parse_globs(self.mask_layers))


@grouped
def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(help=".pth, .pt, .safetensors, a SparseDM N.ckpt or diffusers folder, or a name on the Hub."),
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Engine file, or its folder.", show_default="NAME.sengine"),
    ] = None,
    wanted: Wanted,
    masks: Masks,
    backend: Annotated[str, typer.Option(help="auto or a backend's name (see `sparse-engine doctor`).")] = "auto",
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a name on the Hub (default: its local cache alone).")
    ] = False,
    model: Model,
    beside: Beside,
    autotune: Autotune = True,
    tensorrt: TensorRT,
    quantised: Quantised,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Build an engine from a checkpoint."""
    given = model.options()
    builder = export_module("build")
    path = builder.output_for(checkpoint, output)
    check_writable(path, SUFFIX)
    with progress() as display, kept_if_done(path) as built:
        task = display.add_task("starting", total=None)
        if download:
            display.update(task, description=f"fetching {checkpoint}")
            checkpoint = export_module("hub").download(checkpoint)
        _, manifest = builder.build_engine(
            checkpoint,
            built,
            model=given,
            masks=masks.options(),
            backend=backend,
            options=wanted.options(tensorrt.options(), lambda stage: display.update(task, description=stage)),
            quantisation=quantised.options(),
            assets=export_module("assets").AssetOptions(**vars(beside)),
        )
        display.update(task, description="choosing kernels")
        info = _report(built, manifest, wanted.device, autotune)
        if wanted.require_sparse:
            export_module("write").check_all_sparse(info["layers"])
    if as_json:
        print_json({"path": str(path), "bytes": path.stat().st_size, **info})
    else:
        _tell_built(path, manifest, info)


def _tell_built(path: Path, manifest: Manifest, info: dict[str, Any]) -> None:
    for note in manifest.notes:
        tell(f"note: {note}")
    masked = [layer for layer in info["layers"] if layer["masked"]]
    eligible = sum(layer["eligible"] for layer in masked)
    chosen = sum(bool(layer["chosen"]) for layer in masked)
    where = "on this machine" if "runtime" in info else "as the builder reports"
    backend_line = f"{manifest.backend['name']} {manifest.backend['version']}, {manifest.precision}"
    tell(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {backend_line}; {len(masked)} of {len(manifest.layers)} layers "
        f"masked, {eligible} of them hardware 2:4, {chosen} run by a sparse kernel {where}"
    )


def _bytes(workspace: float | None) -> int | None:
    """GiB -> bytes. Raises OptionError on what is no such size."""
    if workspace is None:
        return None
    least, most = WORKSPACES
    if not least <= workspace <= most:
        raise OptionError(f"--workspace {workspace:g}: expected {least} to {most:.0f} GiB", "for example --workspace 4")
    return int(workspace * 2**30)


def _report(path: Path, manifest: Manifest, device: str | None, autotune: bool) -> dict[str, Any]:
    """What each layer runs here; where the engine is for another machine, what its builder said."""
    if not backend_named(manifest.backend["name"]).availability().usable:
        return manifest.to_dict()
    try:
        with SparseEngine.load(path, device=device, autotune=autotune) as engine:
            return engine.info
    except (UnsupportedError, EngineFileError) as error:
        EngineFile(path)  # raises where the file is damaged; otherwise it is a plan for another GPU
        manifest.notes.append(f"cannot run here: {error.what.removeprefix(f'{path} ')}")
        return manifest.to_dict()


def _batch(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise OptionError(f"--batch {text!r}: expected three whole numbers", "for example --batch 1,16,64")
    smallest, usual, largest = (int(part) for part in parts)
    return smallest, usual, largest
