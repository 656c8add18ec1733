"""Random Hadamard rotations of any width.

A width n = m · 2^k is rotated by Q = S (A ⊗ H), where S are random signs, H is the Hadamard matrix of order 2^k and A is orthogonal of order
m: a Hadamard matrix where Paley's constructions give one for m, 2m, 4m or 8m (then 2^k is smaller by as much), else a random one.
QuaRot (arXiv 2404.00456), section 3; Paley, On orthogonal matrices (1933).
"""

import math

import torch
from torch import Tensor

_CHUNK = 1024**2  #: numbers that are turned at once: copies in float64 of a whole matrix would take gigabytes


class Rotation:
    """An orthogonal matrix Q [width, width] in float64. `seed` decides the signs."""

    def __init__(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        odd, power = width, 1
        while odd % 2 == 0:
            odd, power = odd // 2, power * 2
        self._inner = torch.ones(1, 1, dtype=torch.float64)
        if odd > 1:
            order = next((odd * more for more in (2, 4, 8) if power % more == 0 and _is_paley(odd * more)), odd)
            power //= order // odd
            self._inner = paley(order) / order**0.5 if order > odd else _random(odd, generator)
        self._power = power

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., width] · Q, in x's dtype. Computed in float64, some rows at a time."""
        if len(x) > 1 and x.numel() > _CHUNK:
            return torch.cat([self(part) for part in torch.split(x, max(1, len(x) * _CHUNK // x.numel()))])
        mixed = x.double() * self._signs
        mixed = mixed.reshape(*x.shape[:-1], len(self._inner), self._power)
        mixed = torch.einsum("...mk,mn->...nk", mixed, self._inner)
        return _walsh(mixed).flatten(-2).to(x.dtype)


def _walsh(x: Tensor) -> Tensor:
    """Multiply the last dimension, of a power of two, by Sylvester's Hadamard matrix, scaled to be orthogonal."""
    size = x.shape[-1]
    shape = x.shape
    half = 1
    while half < size:
        pairs = x.reshape(*shape[:-1], size // (2 * half), 2, half)
        x = torch.cat((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -1).reshape(shape)
        half *= 2
    scaled: Tensor = x / size**0.5
    return scaled


def _random(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size] in float64."""
    found: Tensor = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _is_paley(order: int) -> bool:
    first, second = order - 1, order // 2 - 1
    return (_is_prime(first) and first % 4 == 3) or (_is_prime(second) and second % 4 == 1)


def paley(order: int) -> Tensor:
    """A Hadamard matrix of ±1 [order, order] in float64, where order − 1 is a prime 4j + 3, or order/2 − 1 a prime 4j + 1."""
    prime = order - 1 if (order - 1) % 4 == 3 and _is_prime(order - 1) else order // 2 - 1
    residues = {value * value % prime for value in range(1, prime)}
    character = torch.tensor([0] + [1 if value in residues else -1 for value in range(1, prime)], dtype=torch.float64)
    places = torch.arange(prime)
    core = character[(places[:, None] - places[None]) % prime]  # [prime, prime]
    bordered = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    bordered[1:, 1:] = core
    bordered[0, 1:] = 1
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if prime % 4 == 3:
        bordered[1:, 0] = -1
        return identity + bordered
    bordered[1:, 0] = 1
    ones, turned = torch.tensor([[1.0, 1], [1, -1]]).double(), torch.tensor([[1.0, -1], [-1, -1]]).double()
    return torch.kron(bordered, ones) + torch.kron(identity, turned)
