"""The processes of one run, as ``accelerate launch`` starts them: who is who, and one voice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from adapterhub.errors import AdapterHubError, RecipeError
from adapterhub.trainer.recipe import Recipe

T = TypeVar("T")
_FAILED = "adapterhub/failed"
# Set here where `accelerate launch --use_fsdp` asked for it: the trainer divides the model itself.
_SHARDED = "ADAPTERHUB_SHARDED"
_ACCELERATE_FSDP = "ACCELERATE_USE_FSDP"


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number among them, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Its number among those on this machine: that of its GPU."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many of them share this machine's memory."""
    return _number("LOCAL_WORLD_SIZE", world_size())


def shards() -> int:
    """Among how many processes base and adapter are divided (FSDP); 1: each has all of it."""
    return world_size() if os.environ.get(_SHARDED) else 1


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return rank() == 0


@contextmanager
def together() -> Iterator[None]:
    """Join the other processes of the run, if there are any, for the body.

    An error in one ends them all with one message: the first to fail raises it on, the others leave without
    a word (SystemExit with its own exit code), and the launcher ends those that wait for them.
    """
    if world_size() == 1:
        yield
        return
    import torch

    if os.environ.get(_ACCELERATE_FSDP, "false").lower() == "true":
        os.environ[_SHARDED] = "1"
        os.environ[_ACCELERATE_FSDP] = "false"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's way to end who waits for a failed one
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
        os.environ.setdefault("NCCL_DEBUG_FILE", "/dev/stderr")  # stdout is for the result
    store, number, size = next(iter(torch.distributed.rendezvous("env://")))
    backend = "nccl" if cuda else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=number, world_size=size)
    try:
        yield
        torch.distributed.barrier()
    except (Exception, KeyboardInterrupt) as err:
        if _is_first_to_fail(store, number):
            raise
        code = err.exit_code if isinstance(err, AdapterHubError) else 1
        raise SystemExit(code) from err
    torch.distributed.destroy_process_group()


def share(recipe: Recipe, processes: int) -> Recipe:
    """What one of ``processes`` does of ``recipe``: its part of each batch.

    Raises RecipeError when the batch cannot be divided evenly.
    """
    training = recipe.training
    rows, micro = training.batch_size // processes, training.micro_batch
    if training.batch_size % processes or (micro != "auto" and rows % micro):
        each = "" if micro == "auto" else f" with micro-batches of {micro}"
        raise RecipeError(
            f"training.batch_size {training.batch_size} cannot be divided among {processes} processes{each}",
            "make it a multiple of them: it counts the rows of all processes together",
        )
    return recipe.model_copy(update={"training": training.model_copy(update={"batch_size": rows})})


def first_decides(decide: Callable[[], T]) -> T:
    """What ``decide`` returns in the first process, in all of them; only there it is called."""
    if world_size() == 1:
        return decide()
    import torch

    found: list[Any] = [decide() if is_first() else None]
    torch.distributed.broadcast_object_list(found, src=0)
    result: T = found[0]
    return result


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def total(*values: float) -> list[float]:
    """Each value summed over all processes, in float64."""
    if world_size() == 1:
        return list(values)
    import torch

    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(summed)
    return [float(value) for value in summed]


def _is_first_to_fail(store: Any, number: int) -> bool:
    try:
        claimed: bytes = store.compare_set(_FAILED, "", str(number))
    except RuntimeError:  # the store went with the process that held it, which failed before
        return False
    return claimed == str(number).encode()


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise
