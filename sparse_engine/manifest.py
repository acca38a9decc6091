"""The manifest of an engine file: what was built, from what, for what."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sparse_engine.conditioning import Condition, class_condition, classes_of, is_condition
from sparse_engine.errors import EngineFileError
from sparse_engine.files import parsed_json

FORMAT_VERSION = 2
FAST_HASH = "xxh3_128"  # of a payload file, checked at every load: at memory speed, and no proof against intent
LARGEST = 2**53  # of the numbers that JSON carries exactly
_STRINGS = ("tool_version", "family", "prediction", "sampler", "precision", "checkpoint_sha256", "graph_sha256")
_LAYER_FORMS = {"name": str, "masked": bool, "shape": list, "parameters": int, "nonzeros": int, "macs": int}


@dataclass
class Manifest:
    """Everything that an engine file says of itself. ``docs/engine-file.md`` describes each entry.

    Attributes:
        tool_version: of the sparse-engine that wrote it.
        family, config: the model family and everything that fixes its graph.
        data_shape: [C, H, W] of one sample.
        value_range: of pixels, (low, high); None for latents.
        schedule, prediction: as ``sampling`` takes them.
        conditioning: what the network is told beside x and t, ``Condition.to_dict`` of each.
        sampler: the family's own, used where none is named.
        excluded_samplers: name -> why this model is not offered it.
        precision: of the network's products.
        sparse: whether sparse kernels were asked for.
        mask: how the masks were made, so that ``verify`` can make them again.
        layers: one report per layer (see ``export.bake.LayerReport``), with the kernel where one was chosen.
        backend: {"name", "version", ...}, what the payload needs to run.
        batch: (smallest, usual, largest).
        checkpoint_sha256, graph_sha256: of the file built from, and of the step graph.
        notes: what the build said aloud.
        assets: what the engine holds beside the network: "text" and "vae", where they are, with what they need to run.
        quantisation: of an int8 or fp8 engine, how it was calibrated and what that cost; None for others.
        files: payload name -> {"size", "sha256", "xxh3_128"}; the last is missing from files of tool version 0.1.0.
    """

    tool_version: str
    family: str
    config: dict[str, Any]
    data_shape: tuple[int, int, int]
    value_range: tuple[float, float] | None
    schedule: dict[str, Any]
    prediction: str
    conditioning: list[dict[str, Any]]
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
    assets: dict[str, dict[str, Any]] = field(default_factory=dict)
    excluded_samplers: dict[str, str] = field(default_factory=dict)
    quantisation: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What the network is told beside x and t, in the order of the step graph's inputs."""
        return tuple(Condition(**entry) for entry in self.conditioning)

    @property
    def num_classes(self) -> int:
        """Rows of the label table, the null class too; 0 for a network that is told no label."""
        return classes_of(self.conditions)

    @property
    def null_class(self) -> int | None:
        """The row that stands for "no label"; None where there is none."""
        nulls = (each.null for each in self.conditions if each.classes is not None)
        return next((null for null in nulls if isinstance(null, int)), None)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a picture: what the engine's decoder makes of a sample, or the sample itself."""
        if "vae" not in self.assets:
            return self.data_shape
        channels, height, width = self.assets["vae"]["picture"]
        return channels, height, width

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Read ``manifest.json``. Raises EngineFileError on anything that this version cannot be sure of."""
        try:
            values = parsed_json(data)
        except ValueError as error:
            raise EngineFileError(f"{where}: its manifest is not JSON: {error}", "rebuild the engine") from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if not isinstance(version, int) or isinstance(version, bool):
            raise EngineFileError(f"{where}: its manifest has no format version", "rebuild the engine")
        if version > FORMAT_VERSION:
            raise EngineFileError(
                f"{where} has format version {version}, written by sparse-engine {values.get('tool_version', '?')}; "
                f"this one reads up to {FORMAT_VERSION}",
                "upgrade sparse-engine, or rebuild the engine with this version",
            )
        names = {entry.name: entry for entry in dataclasses.fields(cls)}
        values.setdefault("quantisation", None)  # files of tool version 0.1.0 have no such entry
        if version == 1 and not _of_version_1(values):
            raise EngineFileError(f"{where}: its manifest is damaged", "rebuild the engine")
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


def _of_version_1(values: dict[str, Any]) -> bool:
    """Give a manifest of version 1, which knows labels alone, version 2's entries; whether they are well formed."""
    if not {"num_classes", "null_class"} <= values.keys():
        return True  # what it lacks is said with all else that it lacks
    classes, null = values.pop("num_classes"), values.pop("null_class")
    if not _are_numbers([classes], 1, int, least=0) or not (null is None or _are_numbers([null], 1, int, least=0)):
        return False
    values["conditioning"] = [each.to_dict() for each in class_condition(classes, null)]
    values |= {"assets": {}, "excluded_samplers": {}}
    return True


def _well_formed(values: dict[str, Any]) -> bool:
    """Whether every entry has the form that the specification says: readers take them apart without looking."""
    return (
        all(isinstance(values[name], str) for name in _STRINGS)
        and all(isinstance(values[name], dict) for name in ("config", "schedule", "mask", "backend"))
        and isinstance(values["backend"].get("name"), str)
        and isinstance(values["backend"].get("device"), str | None)
        and isinstance(values["quantisation"], dict | None)
        and isinstance(values["sparse"], bool)
        and isinstance(values["conditioning"], list)
        and all(is_condition(entry) for entry in values["conditioning"])
        and _fit_together(values["conditioning"], values["files"])
        and isinstance(values["excluded_samplers"], dict)
        and all(isinstance(why, str) for why in values["excluded_samplers"].values())
        and isinstance(values["assets"], dict)
        and all(isinstance(entry, dict) for entry in values["assets"].values())
        and ("vae" not in values["assets"] or _are_numbers(values["assets"]["vae"].get("picture"), 3, int, least=1))
        and _are_numbers(values["data_shape"], 3, int, least=1)
        and _are_numbers(values["batch"], 3, int, least=1)
        and values["batch"] == sorted(values["batch"])
        and (values["value_range"] is None or _is_range(values["value_range"]))
        and isinstance(values["notes"], list)
        and all(isinstance(note, str) for note in values["notes"])
        and isinstance(values["layers"], list)
        and all(_is_layer(layer) for layer in values["layers"])
        and all(_is_file(entry) for entry in values["files"].values())
    )


def _fit_together(conditioning: list[dict[str, Any]], files: dict[str, Any]) -> bool:
    """Whether names are unlike, masks are conditions of the same length, and stored rows are in the file."""
    found = {entry["name"]: Condition(**entry) for entry in conditioning}
    return len(found) == len(conditioning) and all(
        (each.mask is None or (each.mask in found and each.shape[:1] == found[each.mask].shape))
        and (each.null != "stored" or each.stored in files)
        for each in found.values()
    )


def _are_numbers(value: Any, length: int, kind: Any, least: float = -LARGEST) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(each, kind) and not isinstance(each, bool) and least <= each <= LARGEST for each in value)
    )


def _is_range(value: Any) -> bool:
    return _are_numbers(value, 2, int | float) and value[0] < value[1]


def _is_layer(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry[key], form) for key, form in _LAYER_FORMS.items() if key in entry
    )


def _is_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _are_numbers([entry.get("size")], 1, int, least=0)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get(FAST_HASH, ""), str)
    )
