"""From the command to the arithmetic it is four calls: a reader finds the heart without a map."""

import sys

import torch
from conftest import SHORT

MOST = 4  # calls below the command's function `run`, with that of `backward` or of the mask itself


def open_functions():
    """Names of our functions that are open below the command's `run`, from the outermost on."""
    frame, names = sys._getframe(2), []
    while frame is not None:
        code = frame.f_code
        if "/dsd_refine/" in code.co_filename:
            if code.co_name == "run" and code.co_filename.endswith("cli/app.py"):
                return names[::-1]
            names.append(code.co_name)
        frame = frame.f_back
    return None


def test_backward_and_the_mask_are_four_calls_from_the_command(command, made, tmp_path, monkeypatch):
    """Of every training step; what looks at the model before the first one (`opened`) is another matter."""
    paths = {"backward": set(), "mask": set()}
    backward, multiply = torch.Tensor.backward, torch._foreach_mul_

    def watched(self, *args, **kwargs):
        paths["backward"].add(tuple(open_functions()))
        return backward(self, *args, **kwargs)

    def watched_mask(*args):
        names = open_functions()
        if names is not None and "train_step" in names:
            paths["mask"].add(tuple(names))
        return multiply(*args)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    monkeypatch.setattr("dsd_refine.compat.multiply_in_place", watched_mask)
    monkeypatch.setattr("dsd_refine.masking.masks.multiply_in_place", watched_mask)
    out = tmp_path / "out"
    assert command(made / "timm", "--data", made / "pictures", "-o", out, *SHORT, "--quiet", "--gate", "none").code == 0
    steps = {path for path in paths["backward"] if "train_step" in path}
    assert steps == {("refine", "run_phase", "train_step")}
    assert all(len(path) + 1 <= MOST for path in steps)
    assert paths["mask"] == {("refine", "run_phase", "train_step", "multiply")}
    assert all(len(path) <= MOST for path in paths["mask"])
