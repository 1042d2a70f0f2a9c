"""Kinds of parameters: which are layers that may be masked, and why the others are not.

A weight matrix or a filter bank is a layer. A table, a scale, a norm or a router is not. A
parameter of no known kind is not masked, and the report lists it. `docs/layers.md` shows the result
for the usual models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from dsd_refine.checkpoint.placement import storage_of
from dsd_refine.compat import Convolution, own_parameters

ATTENTION_WEIGHTS = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
NAMED_KINDS = (  # a pattern of parameter names, and the kind
    (r"(?i)relative_position|rel_pos|relative_attention_bias|attention_bias(es)?$", "relative-position table"),
    (
        r"(?i)(cls|class|dist(illation)?|reg|mask|register|storage)_?(token|emb)|(^|\.)(latents?|probe|query_tokens)$",
        "class or other special token",
    ),
    (r"(?i)pos(ition)?(al)?_?(embed|emb|enc)|(^|[._])pos$", "position table"),
    (r"(?i)(^|\.)(gamma\d*|ls\d*|layer_?scale\w*|lambda_?\d*)(\.|$)", "layer scale"),
    (r"(^|\.)(A_log|D|dt_bias)$", "state-space parameter"),
)

# Weight matrices that are parameters of a module of another kind, as `class of the
# module.parameter`. Each is one matrix, whatever its shape.
MATRICES = (
    r"XLNetRelativeAttention\.[qkvor]|FunnelRelMultiheadAttention\.r_kernel|"
    r"RecurrentGemmaRglru\.(input|recurrent)_gate_weight|\w+MultiModalProjector\.mm_input_projection_weight"
)

# LayoutLMv3 keeps its relative-position tables in Linear modules, but only looks rows up in them.
TABLE = r"rel_pos\w*_bias\.weight$"
UNKNOWN = "parameter of no known kind"

Owner = tuple[str, nn.Module, str]  # a module's name, the module, and the attribute that is the parameter

Storage = tuple[object, ...]  # as `storage_of` returns it


def find_owners(model: nn.Module) -> dict[Storage, list[Owner]]:
    """Return the modules that register each storage. A tied parameter has several."""
    owners: dict[Storage, list[Owner]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in own_parameters(module).items():
            if parameter is not None:
                owners.setdefault(storage_of(parameter), []).append((module_name, module, attribute))
    return owners


def find_routers(model: nn.Module) -> set[str]:
    """Return the names of all modules that choose among experts, and of the modules inside them.

    A router has a class with a known name, or is called a gate and stands beside experts.
    """
    routers = set()
    for name, module in model.named_modules():
        children = [child for child, _ in module.named_children()]
        if re.search(r"Router|TopKGat|Mo[eE]Gate(?![a-z])", type(module).__name__):
            routers.add(name)
        if type(module).__name__.startswith("CondConv"):  # `routing_fn` beside it mixes its kernels
            routers.add(f"{name.rpartition('.')[0]}.routing_fn".lstrip("."))
        if any("expert" in child and "gate" not in child for child in children):
            routers |= {f"{name}.{child}".lstrip(".") for child in ("gate", "router", "shared_expert_gate")}
    return {name for name, _ in model.named_modules() if _inside(name, routers)}


def _inside(name: str, routers: set[str]) -> bool:
    """True for a router and the modules inside it, but not for experts that a router also holds."""
    words = name.split(".")
    outer = (".".join(words[: i + 1]) for i in range(len(words)))
    return any(router in routers and "expert" not in name[len(router) :] for router in outer)


def kind_of(
    shape: tuple[int, ...], keys: Sequence[str], places: Sequence[Owner], parameter: torch.Tensor, routers: set[str]
) -> tuple[str | None, bool, int]:
    """Decide whether a tensor of the file may be masked.

    Args:
        shape: The tensor's shape in the file.
        keys: Names of the model's parameters that hold its elements.
        places: The modules that register these parameters.
        parameter: The first of these parameters.
        routers: What `find_routers` returns.

    Returns:
        Why it is not masked (None: it may be), whether --include is refused for it, and the number
        of experts that it fuses along its first dimension (1: none).
    """
    module_name, module, attribute = places[0]
    key = keys[0]
    if any(_is_embedding(m, name) for _, m, name in places):
        tied = len(places) > 1
        return ("embedding, tied to another layer" if tied else "embedding"), tied, 1
    if _reparametrised(module, module_name, attribute):
        return "reparametrised weight", True, 1
    if parameter.ndim < 2 or len(shape) < 2:
        return "1-D parameter", False, 1
    if re.search(r"Norm|GRN$", type(module).__name__) or isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return "norm", False, 1
    if module_name in routers:
        return "router of a mixture", False, 1
    if re.search(TABLE, key):
        return "relative-position table", False, 1
    if _is_weight(module, attribute) and "CondConv" not in type(module).__name__:
        separate = len(set(keys))  # the file may fuse experts that are separate modules of the model
        return None, False, separate if len(shape) == 3 and shape[0] == separate else 1
    experts = _experts(module, attribute, parameter)
    if experts and (re.search(r"Expert|CondConv", type(module).__name__) or _named(key) == UNKNOWN):
        fused = math.prod(shape) > parameter.numel() // experts
        return None, False, experts if fused else 1
    reason = _named(key)
    if reason == UNKNOWN and max(parameter.shape) == parameter.numel():
        reason = "1-D parameter"  # with added axes for broadcasting: (1, 1, n), (n, 1, 1)
    return reason, False, 1


def _named(key: str) -> str:
    """The kind that a parameter's name tells, or UNKNOWN."""
    for pattern, reason in NAMED_KINDS:
        if re.search(pattern, key):
            return reason
    return "bias" if "bias" in key.rsplit(".", 1)[-1] else UNKNOWN


def _is_embedding(module: nn.Module, attribute: str) -> bool:
    """True for a table of embeddings: torch's module, or one with such a name (I-BERT's
    QuantEmbedding).
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    return attribute == "weight" and type(module).__name__.endswith("Embedding") and not _is_weight(module, attribute)


def _reparametrised(module: nn.Module, module_name: str, attribute: str) -> bool:
    """True if the forward computes the weight that it uses: weight norm, spectral norm, weight
    standardisation.
    """
    by_torch = ".parametrizations." in f".{module_name}." or re.search(r"weight\w*_(g|v|orig)$", attribute)
    standardised = re.search(r"StdConv|ScaledStd|WeightStandardi[sz]ed", type(module).__name__) and attribute != "bias"
    return bool(by_torch or standardised)


def _is_weight(module: nn.Module, attribute: str) -> bool:
    """True if the attribute is a weight matrix or a filter bank of the module."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return attribute.startswith("weight_")
    if isinstance(module, nn.MultiheadAttention):
        return attribute in ATTENTION_WEIGHTS
    if attribute != "weight":
        return bool(re.fullmatch(MATRICES, f"{type(module).__name__}.{attribute}"))
    # GPT-2's Conv1D, and the classes of some models that do the work of Linear and Conv2d (I-BERT's
    # QuantLinear).
    named = re.search(r"(Linear|Conv[123][dD])$", type(module).__name__) and own_parameters(module)["weight"] is not None
    return isinstance(module, nn.Linear | nn.Bilinear | Convolution) or bool(named)


def _experts(module: nn.Module, attribute: str, parameter: torch.Tensor) -> int:
    """The number of experts that a parameter fuses.

    0: it does not belong to a mixture of experts.
    """
    if "bias" in attribute or not re.search(r"Expert|Mo[eE]|GLU|CondConv", type(module).__name__):
        return 0
    if parameter.ndim == 3:
        return parameter.shape[0] if max(parameter.shape) < parameter.numel() else 0
    counts = (getattr(module, name, 0) for name in ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts"))
    experts = next((n for n in counts if isinstance(n, int) and n > 0), 0)
    return experts if experts and parameter.shape[0] % experts == 0 else 0


def first_layer(model: nn.Module) -> str | None:
    """Return the name of the first module, in order of definition, that has a weight of a maskable
    kind.

    In a model for images or sound, it is the one that sees pixels or the waveform.
    """
    for name, module in model.named_modules():
        if any(_is_weight(module, attribute) for attribute in own_parameters(module)):
            return str(name)
    return None
