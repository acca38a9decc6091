"""A network rebuilt from its family and configuration, its 2:4 and 8-bit layers given the products that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_engine.errors import EngineFileError
from sparse_engine.manifest import Manifest

from .choose import Chooser, nearest
from .codes import QuantisedWeight
from .convolutions import DenseConvolution, Window
from .layers import ConvolutionLayer, FloatLayer, Layer, QuantisedLayer
from .packing import from_matrix
from .payload import StoredNetwork
from .precision import float_precision

if TYPE_CHECKING:
    from sparse_engine.export.families import FamilyConfig


def rebuild(manifest: Manifest, stored: StoredNetwork, where: str) -> nn.Module:
    """The network of an engine, in evaluation mode and the engine's float precision.

    Args:
        manifest: names the family and its configuration. Nothing else of the file says what the network is.
        stored: its weights; of a layer in 8 bits the network gets the values that the codes stand for.
        where: the engine, for messages.

    Raises:
        EngineFileError: the weights are not those of such a network.
    """
    from sparse_engine.export.families import family_named
    from sparse_engine.export.precision import DTYPES, lower

    family, precision = family_named(manifest.family), float_precision(manifest.precision)
    values = {f"{layer}.weight": weight.dequantised(DTYPES[precision]) for layer, weight in stored.quantised.items()}
    state = {**stored.state, **values}
    with torch.device("meta"):
        network = family.network(config_of(manifest))
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    wrong = [name for name in expected.keys() | state.keys() if name not in expected or name not in state]
    wrong += [name for name in expected.keys() & state.keys() if expected[name].numel() != state[name].numel()]
    if wrong:
        raise EngineFileError(
            f"{where}: {len(wrong)} weights are not those of its {manifest.family} network, such as {sorted(wrong)[0]}",
            "rebuild it with sparse-engine build",
        )
    shaped = {name: _shaped(state[name], shape) for name, shape in expected.items()}
    network.load_state_dict(shaped, assign=True)
    return lower(network.eval().requires_grad_(False), family.float32_layers, precision)


def _shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor as the network has it: packed weights are stored as matrices."""
    return from_matrix(tensor, shape) if (tensor.ndim, len(shape)) == (2, 4) else tensor.reshape(shape)


def config_of(manifest: Manifest) -> FamilyConfig:
    """What fixes the graph of an engine's network."""
    from sparse_engine.export.families import family_named

    config: FamilyConfig = family_named(manifest.family).config_from_dict(manifest.config)
    return config


def choose_products(
    network: nn.Module,
    layers: list[str],
    chooser: Chooser,
    progress: Callable[[str], None] = lambda layer: None,
    quantised: Mapping[str, QuantisedWeight] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Any]]:
    """Replace layers of a network by the products that ``chooser`` picks.

    Args:
        network: on its device, every layer in it a float one.
        layers: those with 2:4 weights.
        chooser: picks.
        progress: told each layer.
        quantised: layer -> its weight in 8 bits, 2:4 or not.
        inputs: of one call with one sample, by name: where ``layers`` has convolutions that are not 1x1, it is run once
            for the sizes of their maps.

    Returns:
        The report of each layer.
    """
    weights = quantised or {}
    sizes = map_sizes(network, [name for name in layers if is_window(network.get_submodule(name))], inputs or {})
    report = {}
    for name in dict.fromkeys([*layers, *weights]):
        progress(name)
        module: Any = network.get_submodule(name)
        if is_product(module):
            choice = chooser.choose(name, _layer(module, weights.get(name), name in layers))
            kind = TwoFourLinear if isinstance(module, nn.Linear) else TwoFourPointwise
            network.set_submodule(name, kind(choice.products, module.weight.dtype))
            report[name] = choice.to_dict()
        elif name in sizes:
            layer = _convolution(module, sizes[name])
            choice = chooser.choose(name, layer)
            if any(not isinstance(product, DenseConvolution) for product in choice.products.values()):
                network.set_submodule(name, TwoFourConvolution(choice.products, layer.dtype, layer.places))
            report[name] = choice.to_dict()
        else:
            report[name] = {"chosen": False, "kernel": "dense", "why": _why_no_product(module)}
    return report


def map_sizes(network: nn.Module, layers: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Layer -> [H, W] of the maps that a convolution is given in a network call with these inputs.

    Those that the call does not come by, or gives maps of several sizes, are left out.
    """
    if not layers:
        return {}
    found: dict[str, set[tuple[int, int]]] = {name: set() for name in layers}
    hooks = []
    for name in layers:

        def note(module: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
            found[name].add(tuple(given[0].shape[2:]))

        hooks.append(network.get_submodule(name).register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            network(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: next(iter(sizes)) for name, sizes in found.items() if len(sizes) == 1}


def _convolution(module: Any, size: tuple[int, int]) -> ConvolutionLayer:
    """A convolution of a network, as products are chosen for it."""
    bias = None if module.bias is None else module.bias.detach()
    padding = (0, 0) if module.padding == "valid" else module.padding
    return ConvolutionLayer(module.weight.detach(), bias, Window(module.kernel_size, module.stride, padding), size)


def _layer(module: Any, quantised: QuantisedWeight | None, sparse: bool) -> Layer:
    """A product of a network, as products are chosen for it."""
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    if quantised is None:
        return FloatLayer(weight.flatten(1), bias)
    return QuantisedLayer(quantised.to(weight.device), bias, weight.dtype, sparse)


def choose_attention(network: nn.Module, inputs: Mapping[str, Tensor], chooser: Chooser) -> dict[str, dict[str, Any]]:
    """Set how each attention of a network runs; one is a module with a method ``attend`` and an attribute ``fused``.

    Args:
        network: on its device.
        inputs: of one call with one sample, by name; it is run once, for the shapes.
        chooser: picks.

    Returns:
        Shape of q, [H, L, D] in words, and the length of k and v where that is another -> what was chosen, and the
        milliseconds of each form at the usual batch.
    """
    found: dict[Any, tuple[torch.Size, int, torch.dtype]] = {}
    modules = [module for module in network.modules() if hasattr(module, "attend") and hasattr(module, "fused")]
    for module in modules:

        def note(q: Tensor, k: Tensor, v: Tensor, *_: Any, module: Any = module, **__: Any) -> Tensor:
            found[module] = (q.shape[1:], k.shape[-2], q.dtype)
            return q

        module.attend = note  # type: ignore[assignment]
    with torch.no_grad():
        network(**inputs)
    report = {}
    for module in modules:
        del module.attend
        if module in found:
            shape, length, dtype = found[module]
            choice = chooser.attention(module, shape, length, dtype)
            module.fused = choice.kernel == "fused"  # type: ignore[assignment]
            words = "x".join(map(str, shape)) + ("" if length == shape[-2] else f" over {length}")
            report[words] = {"kernel": choice.kernel, "milliseconds": choice.milliseconds}
    return report


def is_product(module: nn.Module) -> bool:
    """Whether a layer is one matrix product: a Linear, or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == module.stride == module.dilation == (1, 1) and module.groups == 1
        return plain and module.padding in ((0, 0), "valid")
    return isinstance(module, nn.Linear)


def is_window(module: nn.Module) -> bool:
    """Whether a layer is a convolution that is a product over patches, and not one as it is."""
    if not isinstance(module, nn.Conv2d) or is_product(module):
        return False
    plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return plain and module.padding != "same"


def _why_no_product(module: Any) -> str:
    """What keeps a convolution from being a product."""
    obstacle = "given maps of several sizes, or of none"
    if not is_window(module):
        plain = module.groups == 1 and module.dilation == (1, 1)
        obstacle = "padded otherwise than by zeros" if plain else "in groups" if module.groups != 1 else "dilated"
    return f"a {type(module).__name__} that is {obstacle}: there is no 2:4 product for it"


class TwoFourLinear(nn.Module):
    """A linear layer whose product depends on the number of tokens; ``dtype`` is of what goes in and comes out."""

    def __init__(self, products: Mapping[int, nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.tokens = sorted(products)
        self.products = nn.ModuleList(products[tokens] for tokens in self.tokens)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = x.flatten(0, -2).to(self.dtype)
        return self.product_for(len(rows))(rows).unflatten(0, x.shape[:-1])

    def product_for(self, tokens: int) -> nn.Module:
        """The product for about so many."""
        return self.products[self.tokens.index(nearest(self.tokens, tokens))]


class TwoFourConvolution(TwoFourLinear):
    """A convolution whose product depends on the number of images; each gives so many ``places``."""

    def __init__(self, products: Mapping[int, nn.Module], dtype: torch.dtype, places: int) -> None:
        super().__init__(products, dtype)
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, H', W']."""
        y: Tensor = self.product_for(self.places * len(x))(x.to(self.dtype))
        return y


class TwoFourPointwise(TwoFourLinear):
    """A 1x1 convolution: a linear layer over channels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W] -> [B, N, H, W]."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
