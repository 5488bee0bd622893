"""What the model itself gets wrong, as a low-rank covariance of the whitened residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.spaces import Communicator, reduce, replicate


class ModelError:
    r"""Whitened residuals with covariance C = I + E E^T, E (N, k), rows distributed over `comm`.

    With E^T E = V S^2 V^T the symmetric root needs k x k work only (Woodbury's identity, for C^(-1/2)):
    C^(-1/2) = I - E V diag(1 / (s (1 + s))) V^T E^T, s = sqrt(1 + S^2).
    """

    def __init__(self, factor: Tensor, comm: Communicator | None = None) -> None:
        self.factor, self.comm = factor.detach(), comm
        values, vectors = torch.linalg.eigh(reduce(self.factor.mT @ self.factor, comm))
        s = (1 + values.clamp(min=0)).sqrt()
        self._core = -(vectors / (s * (1 + s))) @ vectors.mT

    def whiten(self, r: Tensor) -> Tensor:
        """C^(-1/2) r, on the tape; r (N,) or (N, columns)."""
        inner = self._core @ reduce(self.factor.mT @ r, self.comm)
        return r + self.factor @ replicate(inner, self.comm)
