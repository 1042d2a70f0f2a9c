"""What kind of thing each parameter of a model is, and so whether a mask may take weights out of it (rules 2 and 3).

The kinds are those of the papers' networks and of later ones: what is one weight matrix or filter bank is a layer; what is a
table, a scale, a norm or a router is none, and a parameter of no known kind is left alone and listed.
`docs/layers.md` shows what this makes of the usual models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

ATTENTION_WEIGHTS = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
NAMED_KINDS = (
    (r"(?i)relative_position|rel_pos|relative_attention_bias|attention_bias(es)?$", "relative-position table"),
    (
        r"(?i)(cls|class|dist(illation)?|reg|mask|register|storage)_?(token|emb)|(^|\.)(latents?|probe|query_tokens)$",
        "class or other special token",
    ),
    (r"(?i)pos(ition)?(al)?_?(embed|emb|enc)|(^|[._])pos$", "position table"),
    (r"(?i)(^|\.)(gamma\d*|ls\d*|layer_?scale\w*|lambda_?\d*)(\.|$)", "layer scale"),
    (r"(^|\.)(A_log|D|dt_bias)$", "state-space parameter"),
)

# weight matrices that a module holds by themselves, as `module class.parameter`: one matrix each, whatever their shape
MATRICES = (
    r"XLNetRelativeAttention\.[qkvor]|FunnelRelMultiheadAttention\.r_kernel|"
    r"RecurrentGemmaRglru\.(input|recurrent)_gate_weight|\w+MultiModalProjector\.mm_input_projection_weight"
)

TABLE = r"rel_pos\w*_bias\.weight$"  # LayoutLMv3 keeps its relative-position tables in Linear modules and only indexes them
UNKNOWN = "parameter of no known kind"

Owner = tuple[str, nn.Module, str]

Storage = tuple[object, ...]


def storage(parameter: torch.Tensor) -> Storage:
    """Equal for two names of one storage: same address, shape and strides."""
    if parameter.is_meta:
        return (id(parameter),)
    return (parameter.data_ptr(), tuple(parameter.shape), parameter.stride())


def find_owners(model: nn.Module) -> dict[Storage, list[Owner]]:
    """Where each storage is registered: (module name, module, attribute)."""
    found: dict[Storage, list[Owner]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(storage(parameter), []).append((module_name, module, attribute))
    return found


def find_routers(model: nn.Module) -> set[str]:
    """Modules that choose among experts, with what is in them: by class, or as the gate beside something called experts."""
    found = set()
    for name, module in model.named_modules():
        children = [child for child, _ in module.named_children()]
        if re.search(r"Router|TopKGat|Mo[eE]Gate(?![a-z])", type(module).__name__):
            found.add(name)
        if type(module).__name__.startswith("CondConv"):  # its kernels are mixed by what stands beside it
            found.add(f"{name.rpartition('.')[0]}.routing_fn".lstrip("."))
        if any("expert" in child and "gate" not in child for child in children):
            found |= {f"{name}.{child}".lstrip(".") for child in ("gate", "router", "shared_expert_gate")}
    return {name for name, _ in model.named_modules() if _inside(name, found)}


def _inside(name: str, routers: set[str]) -> bool:
    """Is it a router or in one (but none of the experts that a router's class may hold as well)?"""
    parts = name.split(".")
    outer = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(router in routers and "expert" not in name[len(router) :] for router in outer)


def kind_of(
    shape: tuple[int, ...], keys: Sequence[str], places: Sequence[Owner], parameter: torch.Tensor, routers: set[str]
) -> tuple[str | None, bool, int]:
    """(reason not to mask it or None, whether --include is refused, groups) of a tensor of the file.

    `shape` is the file's, `keys` the parameters that its elements lie in, `places` where these are registered, `parameter` the
    first of them. `groups` > 1 says that the tensor fuses so many experts along its first dimension.
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
        apart = len(set(keys))  # the file may fuse experts that the model holds apart
        return None, False, apart if len(shape) == 3 and shape[0] == apart else 1
    experts = _experts(module, attribute, parameter)
    if experts and (re.search(r"Expert|CondConv", type(module).__name__) or _named(key) == UNKNOWN):
        fused = math.prod(shape) > parameter.numel() // experts
        return None, False, experts if fused else 1
    reason = _named(key)
    if reason == UNKNOWN and max(parameter.shape) == parameter.numel():
        reason = "1-D parameter"  # in the shape that it is multiplied in: (1, 1, n), (n, 1, 1)
    return reason, False, 1


def _named(key: str) -> str:
    for pattern, reason in NAMED_KINDS:
        if re.search(pattern, key):
            return reason
    return "bias" if "bias" in key.rsplit(".", 1)[-1] else UNKNOWN


def _is_embedding(module: nn.Module, attribute: str) -> bool:
    """A table of embeddings: torch's module, or one that is called so (I-BERT's QuantEmbedding)."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    return attribute == "weight" and type(module).__name__.endswith("Embedding") and not _is_weight(module, attribute)


def _reparametrised(module: nn.Module, module_name: str, attribute: str) -> bool:
    by_torch = ".parametrizations." in f".{module_name}." or re.search(r"weight\w*_(g|v|orig)$", attribute)
    standardised = re.search(r"StdConv|ScaledStd|WeightStandardi[sz]ed", type(module).__name__) and attribute != "bias"
    return bool(by_torch or standardised)


def _is_weight(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return attribute.startswith("weight_")
    if isinstance(module, nn.MultiheadAttention):
        return attribute in ATTENTION_WEIGHTS
    if attribute != "weight":
        return bool(re.fullmatch(MATRICES, f"{type(module).__name__}.{attribute}"))
    # GPT-2's Conv1D, and classes of their own that do what Linear and Conv2d do (I-BERT's QuantLinear)
    named = re.search(r"(Linear|Conv[123][dD])$", type(module).__name__) and module._parameters["weight"] is not None
    return isinstance(module, nn.Linear | nn.Bilinear | nn.modules.conv._ConvNd) or bool(named)


def _experts(module: nn.Module, attribute: str, parameter: torch.Tensor) -> int:
    """The number of experts that a parameter fuses, 0 if it is none of a mixture."""
    if "bias" in attribute or not re.search(r"Expert|Mo[eE]|GLU|CondConv", type(module).__name__):
        return 0
    if parameter.ndim == 3:
        return parameter.shape[0] if max(parameter.shape) < parameter.numel() else 0
    counts = (getattr(module, name, 0) for name in ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts"))
    experts = next((n for n in counts if isinstance(n, int) and n > 0), 0)
    return experts if experts and parameter.shape[0] % experts == 0 else 0


def first_layer(model: nn.Module) -> str | None:
    """The first module in order of definition that has a weight of a maskable kind: the one that sees pixels or waveform."""
    for name, module in model.named_modules():
        if any(_is_weight(module, attribute) for attribute in module._parameters):
            return str(name)
    return None
