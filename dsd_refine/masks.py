"""Which weights can be masked, which are, and the mask itself.

A mask is a bool tensor beside the model, keyed by parameter name, True = keep; nothing is attached to the model. Counts and
ties are decided on the file's tensors, which is what the user sees; the mask then goes where the model holds them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from dsd_refine.errors import RunError, UsageError

Masks = dict[str, torch.Tensor]

ATTENTION_WEIGHTS = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
NAMED_KINDS = (
    (r"(?i)relative_position|rel_pos|relative_attention_bias", "relative-position table"),
    (r"(?i)(cls|class|dist|reg|mask|register|storage)_?(token|embed)", "class or other special token"),
    (r"(?i)pos(ition)?(al)?_?(embed|emb|enc)", "position table"),
    (r"(?i)(^|\.)(gamma\d*|ls\d*|layer_?scale\w*|lambda_?\d*)(\.|$)", "layer scale"),
    (r"(^|\.)(A_log|D|dt_bias)$", "state-space parameter"),
)
UNKNOWN = "parameter of no known kind"
BLOCK = 1 << 18  # weights masked at a time: two blocks stay in the cache


@dataclass(frozen=True)
class Spot:
    """Elements of a parameter: `source` in the file's tensor are `target` in the parameter `key` (empty: all, in order)."""

    key: str
    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """One weight tensor of the file. `groups` > 1 where it fuses that many experts along its first dimension.

    `excluded` is None for a maskable layer, else the reason. `weights` is its number of elements.
    """

    name: str
    shape: tuple[int, ...]
    spots: tuple[Spot, ...]
    groups: int = 1
    excluded: str | None = None
    fixed: bool = False

    @property
    def weights(self) -> int:
        return int(torch.Size(self.shape).numel())

    def masked(self, sparsity: float) -> int:
        """How many weights a mask of this sparsity takes out of the layer (0 if excluded)."""
        return 0 if self.excluded else self.groups * masked_count(self.weights // self.groups, sparsity)


def masked_count(n: int, sparsity: float) -> int:
    """The one formula: round(s * n) weights of n are masked, at most n - 1."""
    return max(0, min(round(sparsity * n), n - 1))


def find_layers(
    model: nn.Module,
    tensors: Mapping[str, tuple[tuple[int, ...], Sequence[Spot]]],
    *,
    first: Iterable[str] = (),
    unreached: Iterable[str] = (),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> list[Layer]:
    """Every parameter tensor of the file as a layer, maskable or with the reason why not, in file order.

    `tensors` maps a file's tensor to its shape and its spots in the model; `first` names the modules that see the input,
    `unreached` the parameters without gradient. The rules are the module kinds of the papers' networks and of later ones:
    what is one weight matrix or filter bank is a layer, what is a table, a scale, a norm or a router is none.

    Raises:
        UsageError: a pattern that matches nothing, or nothing left to mask.
    """
    owners, routers = _owners(model), _routers(model)
    by_key = dict(model.named_parameters(remove_duplicate=False))
    first, unreached = set(first), set(unreached)
    layers: list[Layer] = []
    seen: dict[tuple[object, ...], str] = {}
    for name, (shape, spots) in tensors.items():
        if spots[0].key not in by_key:
            continue  # a buffer
        layer = Layer(name, shape, tuple(spots))
        identity = (*_storage(by_key[spots[0].key]), int(spots[0].target[0]) if len(spots[0].target) else None)
        if identity in seen:
            layers.append(replace(layer, excluded=f"the same storage as {seen[identity]}", fixed=True))
            continue
        seen[identity] = name
        places = [place for spot in layer.spots for place in owners[_storage(by_key[spot.key])]]
        reason, fixed, groups = _kind(layer, places, by_key[spots[0].key], routers)
        if reason is None and any(module_name in first for module_name, _, _ in places):
            reason = "the first layer: it sees the input"
        if reason is None and all(spot.key in unreached for spot in layer.spots):
            reason = "the task's loss does not reach it"
        layers.append(replace(layer, excluded=reason, fixed=fixed, groups=groups))
    layers = _apply_patterns(layers, tuple(include), tuple(exclude))
    if not any(layer.excluded is None for layer in layers):
        raise UsageError("the model has no layer to mask; see `plan` for each parameter's reason, and --include")
    return layers


Owner = tuple[str, nn.Module, str]


Storage = tuple[object, ...]


def _storage(parameter: torch.Tensor) -> Storage:
    """Equal for two names of one storage: same address, shape and strides."""
    if parameter.is_meta:
        return (id(parameter),)
    return (parameter.data_ptr(), tuple(parameter.shape), parameter.stride())


def _owners(model: nn.Module) -> dict[Storage, list[Owner]]:
    """Where each storage is registered: (module name, module, attribute)."""
    found: dict[Storage, list[Owner]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(_storage(parameter), []).append((module_name, module, attribute))
    return found


def _routers(model: nn.Module) -> set[str]:
    """Modules that choose among experts, with what is in them: by class, or as the gate beside something called experts."""
    found = set()
    for name, module in model.named_modules():
        children = [child for child, _ in module.named_children()]
        if re.search(r"Router|TopKGat|Mo[eE]Gate", type(module).__name__):
            found.add(name)
        if any("expert" in child and "gate" not in child for child in children):
            found |= {f"{name}.{child}".lstrip(".") for child in ("gate", "router", "shared_expert_gate")}
    return {name for name, _ in model.named_modules() if _inside(name, found)}


def _inside(name: str, routers: set[str]) -> bool:
    """Is it a router or in one (but none of the experts that a router's class may hold as well)?"""
    parts = name.split(".")
    outer = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(router in routers and "expert" not in name[len(router) :] for router in outer)


def _kind(layer: Layer, places: Sequence[Owner], parameter: torch.Tensor, routers: set[str]) -> tuple[str | None, bool, int]:
    """(reason or None, whether --include is refused, groups) by the module that owns the parameter."""
    module_name, module, attribute = places[0]
    key = layer.spots[0].key
    if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for _, m, _ in places):
        tied = len(places) > 1
        return ("embedding, tied to another layer" if tied else "embedding"), tied, 1
    if _reparametrised(module, module_name, attribute):
        return "reparametrised weight", True, 1
    if parameter.ndim < 2 or len(layer.shape) < 2:
        return "1-D parameter", False, 1
    if re.search(r"Norm", type(module).__name__) or isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return "norm", False, 1
    if module_name in routers:
        return "router of a mixture", False, 1
    if _is_weight(module, attribute):
        apart = len({spot.key for spot in layer.spots})  # the file may fuse experts that the model holds apart
        return None, False, apart if len(layer.shape) == 3 and layer.shape[0] == apart else 1
    experts = _experts(module, attribute, parameter)
    if experts and ("Expert" in type(module).__name__ or _named(key) == UNKNOWN):
        fused = layer.weights > parameter.numel() // experts
        return None, False, experts if fused else 1
    return _named(key), False, 1


def _named(key: str) -> str:
    for pattern, reason in NAMED_KINDS:
        if re.search(pattern, key):
            return reason
    return "bias" if "bias" in key.rsplit(".", 1)[-1] else UNKNOWN


def _reparametrised(module: nn.Module, module_name: str, attribute: str) -> bool:
    by_torch = ".parametrizations." in f".{module_name}." or re.search(r"weight\w*_(g|v|orig)$", attribute)
    return bool(by_torch or re.search(r"StdConv|ScaledStd|WeightStandardi[sz]ed", type(module).__name__))


def _is_weight(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, nn.RNNBase):
        return attribute.startswith("weight_")
    if isinstance(module, nn.MultiheadAttention):
        return attribute in ATTENTION_WEIGHTS
    plain = isinstance(module, nn.Linear | nn.Bilinear | nn.modules.conv._ConvNd)
    return attribute == "weight" and (plain or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")))


def _experts(module: nn.Module, attribute: str, parameter: torch.Tensor) -> int:
    """The number of experts that a parameter fuses, 0 if it is none of a mixture."""
    if "bias" in attribute or not re.search(r"Expert|Mo[eE]|GLU", type(module).__name__):
        return 0
    counts = (getattr(module, name, 0) for name in ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts"))
    experts = next((n for n in counts if isinstance(n, int) and n > 0), parameter.shape[0] if parameter.ndim == 3 else 0)
    return experts if experts and parameter.shape[0] % experts == 0 else 0


def _apply_patterns(layers: list[Layer], include: tuple[str, ...], exclude: tuple[str, ...]) -> list[Layer]:
    def matches(layer: Layer, patterns: tuple[str, ...]) -> bool:
        names = {layer.name, *(spot.key for spot in layer.spots)}
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    for pattern in (*include, *exclude):
        if not any(matches(layer, (pattern,)) for layer in layers):
            raise UsageError(f"the pattern {pattern!r} matches no parameter; `plan` lists the names")
    result = []
    for layer in layers:
        if matches(layer, exclude):
            layer = replace(layer, excluded=layer.excluded or "excluded by --exclude")
        elif layer.excluded and not layer.fixed and matches(layer, include):
            layer = replace(layer, excluded=None)
        result.append(layer)
    return result


def first_layer(model: nn.Module) -> str | None:
    """The first module in order of definition that has a weight of a maskable kind: the one that sees pixels or waveform."""
    for name, module in model.named_modules():
        if any(_is_weight(module, attribute) for attribute in module._parameters):
            return str(name)
    return None


def make_masks(
    layers: Sequence[Layer],
    parameters: Mapping[str, torch.Tensor],
    sparsity: float,
    criterion: str = "magnitude",
    seed: Sequence[int | str] = (),
) -> Masks:
    """Masks for the weights as they are now: exactly `masked_count` False in every maskable layer.

    `magnitude` drops the smallest |w| (paper, section 3), ties by lowest flat index in the file's tensor; `random` draws
    as many from `seed` and the layer's name. A parameter without a masked weight gets no mask.
    """
    flags: dict[str, torch.Tensor] = {}
    for layer in layers:
        if not layer.masked(sparsity):
            continue
        keep = torch.cat([_keep(group, sparsity, criterion, (*seed, layer.name, i)) for i, group in _groups(layer, parameters)])
        for spot in layer.spots:
            if not len(spot.source):
                flags[spot.key] = keep
            else:
                ones = torch.ones(parameters[spot.key].numel(), dtype=torch.bool, device=keep.device)
                flags.setdefault(spot.key, ones)[spot.target.to(keep.device)] = keep[spot.source.to(keep.device)]
    return {key: _shaped(flat, parameters[key]) for key, flat in flags.items()}


def _shaped(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A flat mask with the shape and the strides of its parameter."""
    mask = flat.reshape(parameter.shape)
    if mask.stride() == parameter.stride():
        return mask
    return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)


def _groups(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The layer's values in the file's order, expert by expert."""
    first = layer.spots[0]
    if not len(first.source):
        values = parameters[first.key].detach().reshape(-1)
    else:
        values = parameters[first.key].new_zeros(layer.weights)
        for spot in layer.spots:
            values[spot.source.to(values.device)] = parameters[spot.key].detach().reshape(-1)[spot.target.to(values.device)]
    return enumerate(values.reshape(layer.groups, -1))


def _keep(values: torch.Tensor, sparsity: float, criterion: str, seed: Sequence[int | str]) -> torch.Tensor:
    count = masked_count(len(values), sparsity)
    keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
    if count and criterion == "random":
        generator = torch.Generator().manual_seed(stable_seed(*seed))
        keep[torch.randperm(len(values), generator=generator)[:count].to(values.device)] = False
    elif count:
        score = values.to(torch.float32).abs()
        threshold = torch.kthvalue(score, count).values
        keep = score >= threshold
        ties = (score == threshold).nonzero().reshape(-1)
        keep[ties[: count - int((~keep).sum())]] = False
    return keep


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of its parts alone, on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def apply_masks(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Set every masked weight to exactly +0.0, in place, leaving the bits of all others alone.

    The float32 weights are multiplied as integers by 0 or 1: exact for any value, NaN and -0.0 included, and several times
    faster than masked_fill_ on a CPU.
    """
    for key, mask in masks.items():
        bits, flags = _flat(parameters[key]).view(torch.int32), _flat(mask)
        for start in range(0, len(bits), BLOCK):
            bits[start : start + BLOCK].mul_(flags[start : start + BLOCK])


@torch.no_grad()
def mask_gradients(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Zero the gradients of masked weights, so that they do not count in a gradient norm."""
    for key, mask in masks.items():
        gradient = parameters[key].grad
        if gradient is not None:
            gradient.view(torch.int32).mul_(mask)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as they lie in memory (a mask is made with its parameter's strides)."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


@torch.no_grad()
def masked_values(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that the masks will take out, as flat tensors in logical order."""
    return {name: parameters[name].detach()[~mask] for name, mask in masks.items()}


@torch.no_grad()
def put_back(masks: Masks, values: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Undo a mask: what `masked_values` kept stands where it stood."""
    for name, mask in masks.items():
        parameters[name][~mask] = values[name]


def check_masks(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise RunError if any masked weight is not exactly 0."""
    for key, mask in masks.items():
        wrong = int(torch.count_nonzero(parameters[key].detach()[~mask]))
        if wrong:
            raise RunError(f"{key}: {wrong} masked weights are not 0; the sparse phase is broken, nothing was published")


@torch.no_grad()
def count_zeros(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Layer name -> number of weights that are exactly 0 now, counted in the layer's own elements."""
    return {layer.name: sum(int((group == 0).sum()) for _, group in _groups(layer, parameters)) for layer in layers}
