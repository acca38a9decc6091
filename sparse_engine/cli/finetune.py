"""``sparse-engine finetune``: a dense checkpoint becomes a 2:4 one by training under the mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_engine.errors import OptionError

from .groups import grouped
from .options import MaskLayers, TrainedModel
from .terminal import errors, export_module, parse_globs, print_json, progress, pruning_module, tell


def _training(text: str, *names: str) -> Any:
    """An option of the optimizer and its arithmetic, in a panel of their own."""
    return typer.Option(*names, help=text, rich_help_panel="Training")


def _data(text: str, *names: str) -> Any:
    """An option of how data is read, in a panel of their own."""
    return typer.Option(*names, help=text, rich_help_panel="Data")


def _left(text: str, *names: str) -> Any:
    """An option of what is left behind on the way, in a panel of their own."""
    return typer.Option(*names, help=text, rich_help_panel="Log, checkpoints, pictures")


@dataclass(frozen=True)
class Run:
    """How it is trained, and for how long."""

    method: Annotated[str, typer.Option(help="sparsedm, or a baseline: ste, asp, progressive, dense.")] = "sparsedm"
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 10_000
    batch: Annotated[int, typer.Option(help="Images of an update, over all processes.")] = 128
    seed: Annotated[int, typer.Option(help="Of order, times, noise and what is dropped.")] = 0
    pattern: Annotated[str, typer.Option(help="N:M of the mask.")] = "2:4"
    mask_layers: MaskLayers = None

    def settings(self, optimizer: Optimizer) -> Any:
        """The same for ``pruning``, with the optimizer's. Raises OptionError."""
        settled = {
            "pattern": export_module("masks").Pattern.parse(self.pattern),
            "mask_layers": tuple(parse_globs(self.mask_layers) or ()),
            "betas": _betas(optimizer.betas),
        }
        return pruning_module("settings").Settings(**{**vars(self), **vars(optimizer), **settled})


@dataclass(frozen=True)
class Origin:
    """What is trained, from where on."""

    start: Annotated[
        str | None, typer.Option("--from", help="Weights to start from: a file, or random.", show_default="CHECKPOINT")
    ] = None
    config: Annotated[Path | None, typer.Option(help="A network's config.json, for --from random alone.")] = None
    force: Annotated[bool, typer.Option("--force", help="Take a checkpoint that is 2:4 already.")] = False

    def options(self, checkpoint: Path | None) -> Any:
        """The same for ``pruning``. Raises OptionError."""
        told = pruning_module("settings")
        start = self.start if self.start in (None, told.RANDOM) else Path(self.start)
        return told.Start(checkpoint, start, self.config, self.force)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, its loss and its arithmetic."""

    lr: Annotated[float, _training("Learning rate of AdamW.")] = 2e-4
    warmup: Annotated[int | None, _training("Steps up to it (default: 2500, at most a tenth of the steps).")] = None
    lr_decay: Annotated[str, _training("constant, as SparseDM's, or cosine.")] = "constant"
    weight_decay: Annotated[float, _training("AdamW's, on all parameters.")] = 0.03
    betas: Annotated[str, _training("AdamW's.")] = "0.99,0.999"
    noise_weight: Annotated[float, _training("Of the noise in the loss.")] = 1.0
    teacher_weight: Annotated[
        float | None, _training("Of the dense model's prediction in the loss (default: 0.1 for sparsedm, else 0).")
    ] = None
    mask_decay: Annotated[
        float | None, _training("SR-STE's decay of pruned weights (default: 2e-4 for sparsedm, else 0).")
    ] = None
    ema: Annotated[float, _training("Rate of the averaged weights, which are what is used.")] = 0.9999
    clip_norm: Annotated[float, _training("Largest norm of the gradient; 0 is without.")] = 0.0
    precision: Annotated[str, _training("fp32, or bf16 or fp16 by autocast.")] = "fp32"
    accumulate: Annotated[int, _training("Parts in which each process works through its share of a batch.")] = 1


@dataclass(frozen=True)
class Reading:
    """How data is read."""

    flip: Annotated[bool, _data("Mirror every second image, left to right.", "--flip")] = False
    resize: Annotated[bool, _data("Resize pictures of another size, and take their middle.", "--resize")] = False
    skip_broken: Annotated[bool, _data("Leave out pictures that cannot be read.", "--skip-broken")] = False
    dropout: Annotated[float, _data("How often the class or context is dropped, for guidance.")] = 0.1
    null_context: Annotated[Path | None, _data("A .npy of what 'no context' is.")] = None
    latent_scale: Annotated[float, _data("What latents drawn from their moments are multiplied by.")] = 0.18215


@dataclass(frozen=True)
class Left:
    """What is left behind on the way."""

    log_every: Annotated[int, _left("Steps between lines of log.jsonl.")] = 50
    save_every: Annotated[int, _left("Steps between checkpoints; 0 is the last alone.")] = 500
    keep: Annotated[int, _left("Checkpoints that are kept.")] = 3
    sample_every: Annotated[int, _left("Steps between pictures of samples; 0 is none.")] = 0
    samples: Annotated[int, _left("Samples in a picture.")] = 40
    tensorboard: Annotated[bool, _left("Write the log for TensorBoard too.", "--tensorboard")] = False


@grouped
def command(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="The dense checkpoint, as build takes it: the teacher, and the start.")
    ] = None,
    *,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures, of one folder a class, or of .npy latents; or an .npz."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The run's folder. The same command goes on with it.")
    ] = None,
    run: Run,
    origin: Origin,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="a GPU if there is one")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="PyTorch's own")] = None,
    optimizer: Optimizer,
    reading: Reading,
    left: Left,
    model: TrainedModel,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came out as JSON.")] = False,
) -> None:
    """Train under a 2:4 mask, as SparseDM does; the run's folder is what `build` takes. torchrun for several GPUs."""
    if data is None or output is None:
        raise OptionError(
            "finetune needs --data and -o", "for example sparse-engine finetune dense.pth --data images/ -o run"
        )
    given, settings = model.options(), run.settings(optimizer)
    reporting = pruning_module("settings").Reporting(**vars(left))
    of_data = pruning_module("data").DataOptions(**vars(reading))
    with progress(bar=True) as display:
        task = display.add_task("starting", total=None)

        def stepped(step: int, total: int, losses: Any) -> None:
            display.update(task, description=f"loss {losses['loss']:.4f}", completed=step, total=total)

        done = pruning_module("finetune").finetune(
            origin.options(checkpoint),
            data,
            output,
            settings,
            of_data=of_data,
            reporting=reporting,
            model=given,
            device=device,
            threads=threads,
            say=lambda line: errors.print(line, markup=False, highlight=False),
            stage=lambda text: display.update(task, description=text),
            stepped=stepped,
        )
    if done.first:
        print_json(done.to_dict()) if as_json else _tell_done(done)


def _tell_done(done: Any) -> None:
    loss = f"loss {done.losses['loss']:.4f}, " if done.losses else ""
    pace = f"{done.images_per_second:.1f} images/s" if done.steps > done.begun_at else "nothing left to do"
    tell(f"{done.checkpoint}: {done.steps} steps, {loss}{pace}")


def _betas(text: str) -> tuple[float, float]:
    """ "0.9,0.99" -> (0.9, 0.99). Raises OptionError."""
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"--betas {text!r}: expected two numbers", "for example --betas 0.99,0.999") from error
    return first, second
