"""How many rows a batch of evaluation has. Without gradients, a GPU has room for more than in training."""

from __future__ import annotations

import torch

from dsd_refine.training.evaluate import evaluation_order, scored
from dsd_refine.training.state import Loop

MOST = 8  # times the batch of training
SHARE = 0.5  # of the free memory: rows of other parts may need more than those that are tried
TRAINING = 24  # bytes a weight that training takes later: gradient, two moments, average, what a mask took out, the mask


def evaluation_batch(loop: Loop) -> int:
    """Choose the rows of a batch of evaluation, for each process.

    It is `eval_batch_size` of the recipe. Without it: on a CPU the batch of training; on a GPU
    a multiple of it, as the memory that one batch takes shows.
    """
    recipe, device = loop.recipe, loop.accelerator.device
    if recipe.eval_batch_size is not None or device.type != "cuda":
        return recipe.eval_batch_size or recipe.batch_size
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    longest = evaluation_order(loop.task.eval, loop.task.eval.units)[: recipe.batch_size * loop.world]
    scored(loop, loop.task.eval, [(unit, None) for unit in longest])
    need = torch.cuda.max_memory_allocated(device) - held
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    later = TRAINING * sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
    times = torch.tensor([batches_in(free - later, need)], device=device)
    return recipe.batch_size * int(loop.accelerator.gather(times).min())


def batches_in(free: int, need: int) -> int:
    """Return how many batches of training are one batch of evaluation: a power of two, from 1 to MOST.

    Args:
        free: The bytes that are free on the device, without those that training takes.
        need: The bytes that one batch takes.
    """
    times = 1
    while times < MOST and 2 * times * need <= SHARE * free:
        times *= 2
    return times
