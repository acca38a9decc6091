"""A checkpoint understood: its family, its configuration, and how it was trained."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_engine.conditioning import Condition, classes_of
from sparse_engine.errors import CheckpointError, OptionError, SparseEngineError
from sparse_engine.sampling import SAMPLERS, Schedule, make_trajectory, normal, schedule_from_dict

from .checkpoint import Checkpoint, load_checkpoint
from .diffusers_folder import decoder_beside
from .diffusers_scheduler import scheduler_settings
from .families import Family, FamilyConfig, Layout, Recipe, class_of, family_named, recognise
from .names import listed
from .weight_files import read_json

PREDICTIONS = ("eps", "x0", "v", "flow")
# The settings that a configuration may hold, and what each has to be.
KINDS: dict[str, tuple[type, ...]] = {
    "family": (str,),
    "schedule": (str, Mapping),
    "prediction": (str,),
    "sampler": (str,),
    "null_class": (int,),
    "value_range": (list, tuple),
    "heads": (int,),
    "num_heads": (int,),
    "num_classes": (int,),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model, ready to be baked.

    ``notes`` says aloud whatever could not be read off the weights and was taken from somewhere else.
    """

    checkpoint: Checkpoint
    family: Family
    config: FamilyConfig
    recipe: Recipe
    notes: list[str]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What the network is told, with what is known of "none": the null class of labels."""
        null = self.recipe.null_class
        return tuple(
            dataclasses.replace(each, null=null) if each.classes is not None and null is not None else each
            for each in self.config.conditions
        )

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the network was trained on."""
        said = self.recipe.schedule
        return schedule_from_dict(said if isinstance(said, Mapping) else {"name": said})

    @property
    def num_classes(self) -> int:
        """Rows of the label table, the null class too; 0 for a network that is told no label."""
        return classes_of(self.config.conditions)

    def labels(self, n: int) -> np.ndarray | None:
        """Every class but the null class in turn, int64 [n]; None for a network that is told no label."""
        classes = [label for label in range(self.num_classes) if label != self.recipe.null_class]
        return np.resize(np.array(classes, np.int64), n) if classes else None

    def told(self, images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
        """Something to tell the network of some images, name -> [B, *shape]: labels in turn, defaults, normal noise."""
        told: dict[str, np.ndarray] = {}
        labels = self.labels(int(images.max()) + 1)
        for draw, each in enumerate(self.conditions, start=1):
            if each.classes is not None and labels is not None:
                told[each.name] = labels[images]
            elif each.default is not None:
                told[each.name] = np.full((len(images), *each.shape), each.default, each.dtype)
            else:
                told[each.name] = normal(seed, images, draw, each.shape).astype(each.dtype)
        return told

    def settings(self) -> dict[str, Any]:
        """A configuration that ``load_model`` reads beside these weights, and makes the same model of."""
        config = dataclasses.asdict(self.config)  # type: ignore[call-overload]
        own = {name: value for name, value in config.items() if name in self.family.settings}
        names = ("prediction", "value_range", "null_class", "sampler")
        recipe = {name: getattr(self.recipe, name) for name in names}
        said = self.recipe.schedule
        schedule = dict(said) if isinstance(said, Mapping) else said
        return {"family": self.family.name, **own, "schedule": schedule, **recipe}

    def network(self, state: Mapping[str, np.ndarray]) -> nn.Module:
        """The family's network with the given weights, in evaluation mode."""
        with torch.device("meta"):
            network = self.family.network(self.config)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}
        network.load_state_dict(tensors, assign=True)
        return network.eval().requires_grad_(False)


def load_model(path: str | Path, family: str | None = None, **given: Any) -> Model:
    """Read a checkpoint and work out what it is.

    Args:
        path: as ``load_checkpoint`` takes it.
        family: a family's name; by default what diffusers' ``_class_name`` says, or read off the keys.
        **given: settings that win over a stored configuration (and what diffusers' scheduler beside the network says),
            which wins over defaults: a family's own (``heads``), and ``schedule``, ``prediction``, ``value_range``,
            ``null_class``, ``sampler``. None counts as not given.

    Raises:
        CheckpointError: the file is damaged, of no known family, or its weights contradict the configuration.
        OptionError: a given setting cannot be used.
    """
    checkpoint = load_checkpoint(path)
    where = str(checkpoint.path)
    nested = checkpoint.config.get("nnet", {})
    stored = {**checkpoint.config, **(nested if isinstance(nested, Mapping) else {})}
    check_settings(stored, f"the configuration of {where}", CheckpointError)
    wanted = {name: value for name, value in given.items() if value is not None}
    check_settings(wanted, "the given settings", OptionError)
    trained, said = scheduler_settings(checkpoint.path, {**stored, **wanted}) if class_of(stored) else ({}, [])
    settings = {**trained, **stored, **wanted}
    name = family or stored.get("family")
    chosen = family_named(name) if name else recognise(checkpoint.shapes, where, stored)
    unknown = wanted.keys() - set(KINDS) - chosen.settings
    if unknown:
        raise OptionError(f"{', '.join(sorted(unknown))}: no setting of a {chosen.name} model")
    layout = chosen.layout(checkpoint.shapes)
    if layout is not None:
        checkpoint, settings = _renamed(checkpoint, layout), {**layout.settings, **settings}
    config, notes = chosen.read_config(checkpoint.shapes, settings)
    default = chosen.recipe(config)
    decoder = decoder_beside(checkpoint.path) if class_of(stored) else None
    if decoder is not None and default.value_range is not None and "value_range" not in settings:
        default = dataclasses.replace(default, value_range=None)
        notes = [*notes, f"latents: {decoder.name}/ beside the network decodes what it draws"]
    model = Model(checkpoint, chosen, config, *_recipe(default, config, settings, notes))
    _check_weights(model, where)
    remarks = chosen.remarks(config, checkpoint.state)
    return dataclasses.replace(model, notes=[*checkpoint.notes, *said, *model.notes, *remarks])


def initialised_model(config: Path, family: str | None = None, seed: int = 0, **given: Any) -> Model:
    """A model with weights as its family initialises them, from a configuration alone.

    Args:
        config: a JSON file: "family", the family's own settings, and what ``load_model`` reads of the training.
        family: in place of the file's.
        seed: of the weights.
        **given: as ``load_model`` takes them; they win over the file.

    Raises:
        CheckpointError: no such file, or it describes no network.
        OptionError: a given setting cannot be used.
    """
    stored = read_json(config)
    check_settings(stored, str(config), CheckpointError)
    wanted = {name: value for name, value in given.items() if value is not None}
    check_settings(wanted, "the given settings", OptionError)
    settings = {**stored, **wanted}
    name = family or stored.get("family")
    if not isinstance(name, str):
        raise CheckpointError(f"{config} does not say its family", 'add "family": "uvit", or say --family')
    chosen = family_named(name)
    try:
        sizes = chosen.config_from_dict(settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = {key: tensor.numpy() for key, tensor in chosen.network(sizes).state_dict().items()}
        sizes, notes = chosen.read_config({key: array.shape for key, array in state.items()}, settings)  # checks it
    except SparseEngineError:
        raise
    except Exception as error:  # of any kind, where sizes are none
        raise CheckpointError(
            f"{config} describes no {name} network: {error}", "see config.json of examples/digits"
        ) from error
    digest = hashlib.sha256(config.read_bytes()).hexdigest()
    recipe, notes = _recipe(chosen.recipe(sizes), sizes, settings, notes)
    return Model(Checkpoint(config, state, {}, dict(stored), digest), chosen, sizes, recipe, notes)


def _renamed(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """A checkpoint of another project under the network's own names."""

    def own(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = {layout.names.get(name, name): array for name, array in arrays.items()}
        return {name: array.reshape(layout.shapes.get(name, array.shape)) for name, array in named.items()}

    return dataclasses.replace(
        checkpoint,
        state=own(checkpoint.state),
        masks=own(checkpoint.masks),
        notes=[*checkpoint.notes, *layout.notes],
    )


def check_settings(settings: Mapping[str, Any], where: str, kind: type[SparseEngineError]) -> None:
    """Refuse a setting of the wrong type or value, by name. Raises ``kind``."""
    for name, expected in KINDS.items():
        value = settings.get(name)
        if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            wanted = " or ".join(each.__name__ for each in expected)
            raise kind(f"{where}: {name} is {value!r}; expected {wanted}")
    if settings.get("sampler") is not None and settings["sampler"] not in SAMPLERS:
        raise kind(f"{where}: sampler {settings['sampler']!r} is not known; expected one of {', '.join(SAMPLERS)}")
    pixels = settings.get("value_range")
    if pixels is not None and not (
        len(pixels) == 2
        and all(isinstance(end, (int, float)) for end in pixels)
        and -sys.float_info.max <= pixels[0] < pixels[1] <= sys.float_info.max
    ):
        raise kind(f"{where}: value_range is {pixels!r}; expected two finite numbers, the lower first")


def _recipe(
    default: Recipe, config: FamilyConfig, given: Mapping[str, Any], notes: list[str]
) -> tuple[Recipe, list[str]]:
    """What the user or the stored configuration says of the training, over the family's default."""
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("excluded", "unknown")]
    if default.unknown is not None and not {"schedule", "prediction"} <= given.keys():
        raise CheckpointError(
            f"how the network was trained is not known: {default.unknown}",
            "say --schedule and --prediction, or put both into config.json beside the checkpoint "
            '("schedule" may be a mapping there: {"name": "discrete", "betas": "cosine", "steps": 1024})',
        )
    recipe = dataclasses.replace(default, **{name: given[name] for name in names if name in given})
    if recipe.schedule is None or recipe.prediction is None or recipe.sampler is None:
        raise OptionError("schedule, prediction and sampler cannot be null", "leave the entry out for the default")
    if recipe.value_range is not None:
        low, high = recipe.value_range
        recipe = dataclasses.replace(recipe, value_range=(float(low), float(high)))
    if recipe.prediction not in PREDICTIONS:
        raise OptionError(f"prediction {recipe.prediction!r} is not known; expected one of {', '.join(PREDICTIONS)}")
    schedule = schedule_from_dict(
        recipe.schedule if isinstance(recipe.schedule, Mapping) else {"name": recipe.schedule}
    )
    make_trajectory(recipe.sampler, schedule, 1, prediction=recipe.prediction)  # raises where they do not go together
    null, classes = recipe.null_class, classes_of(config.conditions)
    if null is not None and not classes:
        raise OptionError(f"null class {null} is given, and the model has no labels", "leave it out")
    if null is not None and not 0 <= null < classes:
        raise OptionError(
            f"null class {null} is outside the {classes} rows of the label table",
            "give the index of the class that stands for 'no label', or leave it out",
        )
    notes = list(notes)
    if null is not None and "null_class" not in given:
        notes.append(f"null class = {null}: taken to be the last of {classes}; say it with --null-class")
    if "schedule" not in given:
        notes.append(f"schedule = {recipe.schedule}, prediction = {recipe.prediction}: the family's published training")
    return recipe, notes


def _check_weights(model: Model, where: str) -> None:
    """Hold the keys, shapes and types against those of the network that the configuration gives."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in model.family.network(model.config).state_dict().items()}
    found = model.checkpoint.state
    differing = [("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())]
    kind = f"for a {model.family.name} model"
    problems = [f"{len(names)} {problem} key(s) {kind}: {listed(names)}" for problem, names in differing if names]
    if problems:
        raise CheckpointError(
            f"{where}: {'; '.join(problems)}",
            "check that the checkpoint is complete and of this family",
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{where}: {name} has shape {list(found[name].shape)}; expected {list(shape)}")
        if found[name].dtype != np.float32:
            raise CheckpointError(
                f"{where}: {name} is {found[name].dtype}; expected floats", "dequantise it, then save"
            )
