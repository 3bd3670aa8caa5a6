"""Where tensors live, how random numbers are drawn, work cut into batches and shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from numbers import Integral
from operator import index

import torch
from torch import Tensor
from tqdm import tqdm


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_of(tensor: Tensor) -> int:
    """Where the values of a tensor lie; 0 where it has none, or hides them, as inside `torch.vmap`."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and not tensor.is_meta else 0
    except NotImplementedError:  # by torch, of a tensor in vmap
        return 0


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for `seed`. Draw from one of the CPU, then move, and every device sees the same numbers.

    One of another `device` draws faster there, and other numbers.
    """
    return torch.Generator(device).manual_seed(whole(seed))


def whole(seed: int) -> int:
    """A seed as an int of Python; raises where it is no whole number of 64 bits."""
    try:
        number = index(seed)
    except TypeError:
        raise TypeError(f"seed must be an int, got {type(seed).__name__}; pass for example seed=0.") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be an int of 64 bits, got {number}; pass for example seed=0.")
    return number


def seed_of(seed: int, *parts: object) -> int:
    """A seed of 62 bits for what is drawn under `seed` and these names and numbers, the same on every machine.

    Draws that belong to (seed, method, stage, image) and to nothing else do not depend on the order of work.
    """
    # ints of numpy are ints
    plain = [whole(seed), *(index(part) if hasattr(part, "__index__") else part for part in parts)]
    return int.from_bytes(blake2b(repr(plain).encode(), digest_size=8).digest(), "big") >> 2


@contextmanager
def local_seed(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block, for library code that knows no other.

    The state the caller had is restored on the way out, also after an exception.
    """
    start, state = generator(seed).get_state(), torch.get_rng_state()
    try:
        torch.set_rng_state(start)
        yield
    finally:
        torch.set_rng_state(state)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `range(count)` in order, each of at most `size`."""
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise ValueError(f"the batch size must be at least 1, got {size!r}: it is a whole number of images.")
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def progress(total: int, *, show: bool = True) -> tqdm:
    """A plain text progress bar on standard error; name the step with `.set_postfix_str`."""
    return tqdm(total=total, disable=not show, leave=False)
