"""The manifest of an engine file: what was built, from what, for what."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from sparse_engine.errors import EngineFileError

FORMAT_VERSION = 1


@dataclass
class Manifest:
    """Everything that an engine file says of itself. ``docs/engine-file.md`` describes each entry.

    Attributes:
        tool_version: of the sparse-engine that wrote it.
        family, config: the model family and everything that fixes its graph.
        data_shape: [C, H, W] of one sample.
        value_range: of pixels, (low, high); None for latents.
        schedule, prediction: as ``sampling`` takes them.
        num_classes: rows of the label table, the null class too; 0 is unconditional.
        null_class: the row that stands for "no label"; None where there is none.
        sampler: the family's own, used where none is named.
        precision: of the network's products.
        sparse: whether sparse kernels were asked for.
        mask: how the masks were made, so that ``verify`` can make them again.
        layers: one report per layer (see ``export.bake.LayerReport``), with the kernel where one was chosen.
        backend: {"name", "version", ...}, what the payload needs to run.
        batch: (smallest, usual, largest).
        checkpoint_sha256, graph_sha256: of the file built from, and of the step graph.
        notes: what the build said aloud.
        quantisation: of an int8 or fp8 engine, how it was calibrated and what that cost; None for others.
        files: payload name -> {"size", "sha256"}.
    """

    tool_version: str
    family: str
    config: dict[str, Any]
    data_shape: tuple[int, int, int]
    value_range: tuple[float, float] | None
    schedule: dict[str, Any]
    prediction: str
    num_classes: int
    null_class: int | None
    sampler: str
    precision: str
    sparse: bool
    mask: dict[str, Any]
    layers: list[dict[str, Any]]
    backend: dict[str, Any]
    batch: tuple[int, int, int]
    checkpoint_sha256: str
    graph_sha256: str
    notes: list[str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantisation: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Read ``manifest.json``. Raises EngineFileError on anything that this version cannot be sure of."""
        try:
            values = json.loads(data)
        except ValueError as error:
            raise EngineFileError(f"{where}: its manifest is not JSON: {error}", "rebuild the engine") from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if not isinstance(version, int):
            raise EngineFileError(f"{where}: its manifest has no format version", "rebuild the engine")
        if version > FORMAT_VERSION:
            raise EngineFileError(
                f"{where} has format version {version}, written by sparse-engine {values.get('tool_version', '?')}; "
                f"this one reads up to {FORMAT_VERSION}",
                "upgrade sparse-engine, or rebuild the engine with this version",
            )
        names = {entry.name: entry for entry in dataclasses.fields(cls)}
        values.setdefault("quantisation", None)  # files of tool version 0.1.0 have no such entry
        missing = [name for name in names if name not in values]
        if missing or not isinstance(values["files"], dict):
            raise EngineFileError(f"{where}: its manifest lacks {', '.join(missing) or 'files'}", "rebuild the engine")
        if not _well_formed(values):
            raise EngineFileError(f"{where}: its manifest is damaged", "rebuild the engine")
        manifest = cls(**{name: values[name] for name in names})
        manifest.data_shape = tuple(manifest.data_shape)  # type: ignore[assignment]
        manifest.batch = tuple(manifest.batch)  # type: ignore[assignment]
        if manifest.value_range is not None:
            manifest.value_range = tuple(manifest.value_range)  # type: ignore[assignment]
        return manifest


def _well_formed(values: dict[str, Any]) -> bool:
    """Whether what every reader takes apart has the form that the specification says."""
    lists = [
        (values["data_shape"], 3),
        (values["batch"], 3),
        *([(values["value_range"], 2)] if values["value_range"] else []),
    ]
    numbers = all(
        isinstance(each, list) and len(each) == length and all(isinstance(item, (int, float)) for item in each)
        for each, length in lists
    )
    files = all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in values["files"].values())
    layers = isinstance(values["layers"], list) and all(isinstance(layer, dict) for layer in values["layers"])
    return numbers and files and layers and isinstance(values["backend"], dict)
