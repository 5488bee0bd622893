r"""The problems that a training visits, one for each mini-batch of each epoch:

    min_m J(m) = loss(F(m), labels) + decay/2 ||m||^2,    F(m) the scores of the batch's inputs,

LeastSquares where the loss has a residual, scaled so that J is a mean, and Composite where it has none.

All that is random, the batches and what the model draws (injected noise, dropout), follows from (seed, epoch,
batch). So J on a batch is one function for as long as a line search looks at it, and a resumed run needs no
state of a generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from inverse.losses import Loss
from inverse.problem import Composite, LeastSquares, Mapped
from inverse.regularizers.tikhonov import Tikhonov
from solvers.errors import GliodeError
from solvers.node.weights import Parameters
from solvers.ode.integrate import Noise

Data = tuple[Tensor, Tensor]


def batches(n: int, size: int | None, seed: int, epoch: int) -> list[Tensor | None]:
    """The rows of each mini-batch of an epoch: a permutation in n // size parts; [None]: all rows."""
    if size is None or n // size < 2:
        return [None]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(_number(seed, epoch)))
    return list(order.tensor_split(n // size))


def _number(*path: int) -> int:
    """A seed of its own for each path of numbers."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> np.uint64(1))


def require_fit(model: nn.Module, loss: Loss, data: Data, name: str) -> tuple[int, ...]:
    """The shape of what the model returns for one input.

    Raises GliodeError, naming the data, unless the model takes the inputs and the loss what it returns.
    """
    inputs, labels = data
    own = next(model.parameters())
    if len(inputs) == 0 or len(labels) != len(inputs):
        raise GliodeError(
            f"{name}: {len(inputs)} inputs, {len(labels)} labels; give one label for each input"
        )
    if (inputs.dtype, inputs.device, labels.device) != (own.dtype, own.device, own.device):
        raise GliodeError(
            f"{name}: {inputs.dtype} on {inputs.device} (labels on {labels.device}), the model is "
            f"{own.dtype} on {own.device}; bring one to the other by .to(...)"
        )
    if not bool(torch.isfinite(inputs).all()):
        raise GliodeError(f"{name}: the inputs hold NaN or infinite values; leave those out")
    training = model.training
    model.eval()
    with torch.no_grad():
        few = model(inputs[:2])
    model.train(training)
    loss.require_fit(few, labels[:2])
    loss.require_fit(few.new_zeros(len(labels), *few.shape[1:]), labels)
    return tuple(few.shape[1:])


def digest(data: Data) -> str:
    """Of the contents."""
    found = hashlib.sha256()
    for part in data:
        found.update(f"{part.dtype} {tuple(part.shape)}".encode())
        found.update(part.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class BatchProblems:
    """J on each mini-batch of the data, in the space of the model's parameters (`parameters.space`).

    count: mini-batches an epoch. The other arguments are those of `inverse.training.train`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Data,
        batch: int | None = None,
        length: float = 0.0,
        decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if batch is not None and batch < 1:
            raise GliodeError(f"train: batch must be 1 or more, or None for all inputs, got {batch}")
        if seed < 0:
            raise GliodeError(f"train: the seed must not be negative, got {seed}")
        self.parameters = Parameters(model, length)
        self._output = require_fit(model, loss, data, "data")
        self.regularizer = Tikhonov(self.parameters.space, decay) if decay else None
        self.model, self.loss, self.data, self.batch, self.seed = model, loss, data, batch, seed
        self.count = len(batches(len(data[0]), batch, seed, 0))
        noises = [getattr(module, "noise", None) for module in model.modules()]
        self._generators = [n.generator for n in noises if isinstance(n, Noise) and n.generator is not None]

    def of(self, epoch: int) -> Iterator[Mapped]:
        """The problems of an epoch, one after the other."""
        for number, rows in enumerate(batches(len(self.data[0]), self.batch, self.seed, epoch)):
            yield self._problem(rows, _number(self.seed, epoch, number))

    def _problem(self, rows: Tensor | None, seed: int) -> Mapped:
        inputs, labels = self.data
        if rows is not None:
            rows = rows.to(inputs.device)
            inputs, labels = inputs[rows], labels[rows]
        loss, space = self.loss, self.parameters.space

        def scores(m: Tensor) -> Tensor:
            weights = dict(self.parameters.unpack(m.to(inputs.device)))
            with self._seeded(seed, inputs.device):
                out: Tensor = functional_call(self.model, weights, (inputs,))
            return out

        residual: Callable[[Tensor, Tensor], Tensor] | None = getattr(loss, "residual", None)
        if residual is None:
            return Composite(space, scores, lambda s: loss(s, labels), self.regularizer)
        nothing = torch.zeros_like(residual(inputs.new_zeros(len(labels), *self._output), labels))
        sd = math.sqrt(len(labels))
        return LeastSquares(space, lambda m: residual(scores(m), labels), nothing, sd, self.regularizer)

    @contextmanager
    def _seeded(self, seed: int, device: torch.device) -> Iterator[None]:
        """What the model draws inside follows from the seed; torch's own generators are left as they were."""
        cuda = device.type == "cuda"
        with torch.random.fork_rng(devices=[device] if cuda else []):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.2 ms
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            for place, generator in enumerate(self._generators):
                generator.manual_seed(_number(seed, place))
            yield
