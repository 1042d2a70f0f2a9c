"""What is masked comes back: by its gradient in the dense phase, or, where no row reaches it, with the source's value."""

import builders
import pytest
import torch
from outputs import report_of, same
from runs import stop_after
from safetensors.torch import load_file, save_file

from dsd_refine.masking.layers import Layer, TensorSlice
from dsd_refine.masking.masks import never_back, trained_groups, without_gradient

ALL = torch.empty(0, dtype=torch.int64)
RUN = ("--gate", "none", "--batch-size", "4", "--device", "cpu", "--optimizer", "sgd", "--lr", "0.1", "--dense-lr", "0.1")
STEPS = ("--sparse-steps", "3", "--dense-steps", "4")
KINDS = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 16, "layer_types": ["sliding_attention"] * 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 24, "head_dim": 16},
}


def frozen(kind, phases=2):
    """The router, which would come to choose the others."""
    name = "*router.weight" if kind == "gpt_oss" else "*gate.weight"
    return [option for number in range(phases) for option in ("--set", f"phases.{number}.frozen=['{name}']")]


def mixture(folder, kind):
    """A mixture of four experts of which each token takes one: never the last two, whose scores are 0 where another's is not."""
    import transformers

    common = {
        "vocab_size": len(builders.SPECIAL) + len(builders.WORDS), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 1,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**common, **KINDS[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            with torch.no_grad():
                parameter[1], parameter[2:] = -parameter[0], 0.0
        if name.endswith("router.bias"):
            parameter.data.zero_()
    return builders.save_transformers(model, folder, builders.word_tokenizer())


def experts(folder, unreached):
    """Each expert's tensor of the file, by name: those of the last two experts, or of the first two."""
    found = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if "expert" in name and "bias" not in name:
            part = name.partition("experts.")[2].split(".")[0]
            pieces = {name: value} if part.isdigit() else {f"{name}[{n}]": value[n] for n in range(4)}
            number = {piece: int(part) if part.isdigit() else n for n, piece in enumerate(pieces)}
            found |= {piece: held for piece, held in pieces.items() if (number[piece] >= 2) == unreached}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", ["best", "last"])
def test_an_expert_that_no_row_reaches_has_the_source_s_weights(command, made, tmp_path, kind, keep):
    source, out = mixture(tmp_path / kind, kind), tmp_path / "out"
    args = [
        source,
        "--data",
        made / "documents.txt",
        "-o",
        out,
        *RUN,
        *STEPS,
        *frozen(kind),
        "--keep",
        keep,
        "--set",
        "weight_decay=0",
    ]
    found = command(*args, "--control", "random", "--control", "dense")
    assert found.code == 0, found.err
    before, after = experts(source, unreached=True), experts(out, unreached=True)
    assert before
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    reached = experts(out, unreached=False)
    assert all(bool((value != 0).all()) for value in reached.values())
    assert any(not torch.equal(value, experts(source, unreached=False)[name]) for name, value in reached.items())
    report = report_of(out)
    [line] = [warning for warning in report["warnings"] if "got no gradient in the dense phase" in warning]
    layers = {layer["name"]: layer for layer in report["layers"]}
    masked = sum(layers[name.partition("[")[0]]["masked"] / (4 if "[" in name else 1) for name in before)
    assert line.startswith(f"{masked:,.0f} masked weights in ")
    assert any(name.partition("[")[0] in line for name in before)
    assert command("verify", source, out).code == 0


def test_what_is_kept_back_is_judged_too_and_survives_a_stop(command, made, tmp_path):
    source = mixture(tmp_path / "source", "mixtral")
    outs = [tmp_path / "whole", tmp_path / "stopped"]
    args = [
        [
            source,
            "--data",
            made / "documents.txt",
            "-o",
            out,
            *RUN,
            *STEPS,
            *frozen("mixtral"),
            "--quiet",
            "--control",
            "random",
        ]
        for out in outs
    ]
    assert command(*args[0]).code == 0
    for at in (1, 4, 1, 6):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            command(*args[1], "--resume")
    found = command(*args[1], "--resume")
    assert found.code == 0, found.err
    same(*outs)


@pytest.mark.parametrize(
    "options",
    [
        ("--dense-steps", "0"),
        ("--dense-steps", "3", "--dense-lr", "0", "--set", "weight_decay=0"),
        ("--dense-steps", "3", "--keep", "sparse"),
        ("--dense-steps", "3", "--set", "phases.1.frozen=['*experts*']"),
    ],
)
def test_zeros_that_were_asked_for_stay(command, made, tmp_path, options):
    """No dense step, no rate, the sparse result itself, or layers that the dense phase freezes."""
    source, out = mixture(tmp_path / "source", "mixtral"), tmp_path / "out"
    given = [source, "--data", made / "documents.txt", "-o", out, *RUN, "--sparse-steps", "2", *options, "--control", "none"]
    found = command(*given)
    assert found.code == 0, found.err
    report = report_of(out)
    assert not any("got no gradient" in warning for warning in report["warnings"])
    zeros = sum(int((value == 0).sum()) for value in experts(out, unreached=True).values())
    assert zeros == sum(round(0.3 * value.numel()) for value in experts(out, unreached=True).values())


def test_the_phases_of_dsdsd_each_give_back(command, made, tmp_path):
    """The second mask is made of an expert's own weights, not of the first mask's zeros."""
    source, out = mixture(tmp_path / "source", "mixtral"), tmp_path / "out"
    cut = [o for n in range(4) for o in ("--set", f"phases.{n}.epochs=0.5")]
    found = command(
        source, "--data", made / "documents.txt", "-o", out, *RUN, "--recipe", "dsdsd", *frozen("mixtral", 4), *cut, "--control", "none",
        "--save-phases", "--set", "weight_decay=0",
    )  # fmt: skip
    assert found.code == 0, found.err
    before = experts(source, unreached=True)
    for phase in ("2-dense", "4-dense"):
        kept = experts(out / "dsd/phases" / phase, unreached=True)
        assert all(torch.equal(kept[name], before[name]) for name in before), phase
    third = experts(out / "dsd/phases/3-sparse", unreached=True)
    for name, value in third.items():
        least = before[name].abs().flatten().sort().values[round(0.25 * value.numel())]
        assert bool((value[before[name].abs() >= least] != 0).all())


def test_a_filter_that_is_never_active_keeps_its_zeros_where_others_of_its_layer_train(command, made, tmp_path):
    """Its BatchNorm has the statistics of what it gives now: old weights under new statistics would ruin the model."""
    source = builders.copy_folder(made / "timm", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    dead, norm = "layer1.0.conv1.weight", "layer1.0.bn1"
    tensors[f"{norm}.weight"][0], tensors[f"{norm}.bias"][0] = 0.0, -1.0  # and then ReLU
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    still = [o for n in (0, 1) for o in ("--set", f"phases.{n}.frozen=['{norm}.*']")]
    found = command(
        source, "--data", made / "pictures", "-o", out, *RUN, *STEPS, *still, "--control", "none", "--set", "weight_decay=0"
    )
    assert found.code == 0, found.err
    result = load_file(out / "model.safetensors")
    zeros = result[dead][0] == 0
    assert 0 < int(zeros.sum()) < zeros.numel()
    assert torch.equal(result[dead][0][~zeros], tensors[dead][0][~zeros])
    assert bool((result[dead][1:] != tensors[dead][1:]).any())
    assert not any("got no gradient" in warning for warning in report_of(out)["warnings"])


def test_a_layer_that_has_a_gradient_is_found_at_its_first_step():
    layers = [Layer.of_parameter("w", torch.empty(4, 4))]
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    known = trained_groups(layers, {"w": parameter})
    assert known == [("w", 0)]
    assert without_gradient(layers, {"w": parameter}, known) == known  # no gradient at all
    parameter.grad = torch.zeros(4, 4)
    assert without_gradient(layers, {"w": parameter}, known) == known  # 0 everywhere
    parameter.grad[2, 3] = 1e-30
    assert without_gradient(layers, {"w": parameter}, known) == []


def test_experts_of_a_fused_layer_are_told_apart():
    """And what was 0 in the source stays 0."""
    parameter = torch.nn.Parameter(torch.zeros(3, 2, 2))
    layers = [Layer("e", (3, 2, 2), (TensorSlice("e", ALL, ALL),), groups=3)]
    source = torch.ones(3, 2, 2)
    source[1, 0, 0] = 0.0
    parameter.grad = torch.zeros(3, 2, 2)
    parameter.grad[0] = 1.0
    left = without_gradient(layers, {"e": parameter}, trained_groups(layers, {"e": parameter}))
    assert left == [("e", 1), ("e", 2)]
    flags = never_back(layers, {"e": parameter}, {"e": source}, [["e", 1]])["e"]  # as it comes back from the saved state
    assert flags.nonzero().tolist() == [[1, 0, 1], [1, 1, 0], [1, 1, 1]]
