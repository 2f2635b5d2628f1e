"""The tensors of masked_adamw_ as the compiled kernels take them: a column of integers per field."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# csrc/common/dtype.h and csrc/common/masked_adamw.h
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _region(weight: Tensor, axis: int, index: Tensor | None) -> tuple[int, int, int, int, int]:
    """Return the address of the indices, and outer, size, count and inner of the region."""
    if index is None or index.numel() == weight.shape[axis]:
        return 0, 1, 1, 1, weight.numel()
    before, after = weight.shape[:axis], weight.shape[axis + 1 :]
    return index.data_ptr(), math.prod(before), weight.shape[axis], index.numel(), math.prod(after)


def adamw_columns(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor | None],
    max_exp_avg_sqs: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    ids: Sequence[int],
    offsets: Sequence[int],
) -> tuple[Sequence[int], ...]:
    """Return all that a kernel needs of the tensors, but for the gradients' addresses (bindings/adamw_tensors.h)."""
    types = [NUMBERS[weight.dtype] for weight in weights]
    return (
        *map(_addresses, (weights, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, extras, copies, steps)),
        *map(list, zip(*map(_region, weights, axes, indices), strict=True)),
        types,
        [NUMBERS[grad.dtype] for grad in grads],
        [number if copy is None else NUMBERS[copy.dtype] for number, copy in zip(types, copies, strict=True)],
        [i is not None and g.shape != w.shape for w, g, i in zip(weights, grads, indices, strict=True)],
        ids,
        offsets,
    )
