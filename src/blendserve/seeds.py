"""Seeds of single choices: fixed by what the user gave, so that a rerun draws the same tokens."""

from __future__ import annotations

from hashlib import blake2b


def choice_seed(seed: int, choice: int) -> int:
    """Seed of one of the `n` choices of a request that gave `seed`, in [-2^63, 2^63); the first has the request's own.

    Returns: in [0, 2^63).
    """
    return derived_seed(b"seed", seed.to_bytes(8, "little", signed=True), choice) if choice else seed % 2**63


def derived_seed(domain: bytes, secret: bytes, choice: int) -> int:
    """A seed in [0, 2^63) that depends on nothing but its arguments."""
    digest = blake2b(secret, digest_size=8, key=domain, salt=choice.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") >> 1
