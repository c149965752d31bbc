"""Refuse to go on with losses, gradients or weights that are no numbers; keep what made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from motionmerge.errors import DataError, MotionMergeError
from motionmerge.io.atomic import atomic_path

from .objective import Drawn
from .run_state import RunFolder

BAD_BATCH = "bad-batch.pt"


def check_figures(
    figures: Sequence[torch.Tensor],
    books: RunFolder,
    *,
    done: int,
    batch_size: int,
    draw: Callable[[Sequence[int]], Drawn] | None,
) -> None:
    """Check the last steps.

    Args:
        figures: Loss and gradient norm of each, `[2]`.
        books: The batch is kept in its folder.
        done: How many steps are done.
        batch_size: Samples a step.
        draw: Draws samples by their indices; None on processes that write no files.

    Raises:
        DataError: One of them is not a number.
    """
    if not figures:
        return
    is_bad = ~torch.stack(list(figures)).isfinite().all(1)
    if not bool(is_bad.any()):
        return
    first = int(is_bad.int().argmax())
    step = done - len(figures) + first
    indices = range(step * batch_size, (step + 1) * batch_size)
    kept = f"the samples are in {books.folder / BAD_BATCH}"
    if draw is not None:
        try:
            _keep_batch(books, step, indices, draw)
        except (MotionMergeError, OSError, RuntimeError) as error:  # the disk may be full
            kept = f"the samples are {indices[0]} to {indices[-1]}, and were not kept: {error}"
    raise DataError(
        f"Loss and gradient norm of step {step + 1} are {figures[first].tolist()}; {kept}, "
        f"the state before is kept ({_newest(books)}).",
        fix="Look at these samples; or start a run in another folder with a lower "
        "`learning_rate` or `precision='fp32'`.",
    )


def _keep_batch(
    books: RunFolder, step: int, indices: range, draw: Callable[[Sequence[int]], Drawn]
) -> None:
    drawn = draw(indices)
    plain = tuple(drawn) if isinstance(drawn, tuple) else drawn
    with atomic_path(books.folder / BAD_BATCH) as temporary:
        torch.save({"step": step, "indices": list(indices), "drawn": plain}, temporary)


def are_finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Check weights; of sharded ones the part of this process."""
    own = (one.to_local() if isinstance(one, DTensor) else one for one in parameters)
    return bool(torch.stack([one.detach().isfinite().all() for one in own]).all())


def bad_weights(step: int, books: RunFolder) -> DataError:
    """Return the error for weights that are no numbers after a step."""
    return DataError(
        f"After step {step} weights are infinite or no numbers; the state before is kept "
        f"({_newest(books)}).",
        fix="Start a run in another folder with a lower `learning_rate`.",
    )


def _newest(books: RunFolder) -> str:
    return next((state.name for state in books.states()), "none yet")
