"""The sections of a training's case file: every key with its meaning, default and limits.

`scripts.training_case` puts them together and makes data, networks, losses and methods of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from solvers.errors import GliodeError
from solvers.node.activations import activation
from solvers.ode.tableaux import tableau
from tumour.case_sections import NotNegative, Number, Positive, Section, Whole, problem

Count = Annotated[Whole, Field(ge=1)]


def _folder(path: Path, info: ValidationInfo) -> Path:
    path = ((info.context or {}).get("folder", Path()) / path.expanduser()).resolve()
    if not path.is_dir():
        raise problem(
            f"no such folder: {path}; put the four files of MNIST or Fashion-MNIST there (as downloaded, "
            "*-ubyte or *-ubyte.gz), or name the folder that has them"
        )
    return path


def _scheme(name: str) -> str:
    try:
        return tableau(name).name
    except GliodeError as error:
        raise problem(str(error)) from error


def _activation(name: str) -> str:
    try:
        return activation(name).name
    except GliodeError as error:
        raise problem(str(error)) from error


Folder = Annotated[Path, AfterValidator(_folder)]
Scheme = Annotated[str, AfterValidator(_scheme)]
Sigma = Annotated[str, AfterValidator(_activation)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]

# -- data ----------------------------------------------------------------------------------------------------


class PlanarData(Section):
    """A set of two classes in the plane (inverse.datasets.planar)."""

    source: Literal["planar"]
    set: Literal["donut1d", "donut2d", "spiral", "squares"] = Field(description="which")
    train: Count | None = Field(default=None, description="points to train on; default: the literature's")
    validation: Whole = Field(default=0, description="points to watch while training")
    test: Count = Field(default=5000, description="points to report on")


class DigitsData(Section):
    """scikit-learn's handwritten digits, 8 x 8, split at random by the seed."""

    source: Literal["digits"]
    validation: Whole = Field(default=0, description="pictures to watch while training, 0 or 10 and more")
    test: Count = Field(default=360, description="pictures to report on")
    range: Pair = Field(default=[0.0, 1.0], description="what white and black become: [0, 1]")


class IdxData(Section):
    """MNIST or Fashion-MNIST from a folder with their four IDX files."""

    source: Literal["idx"]
    folder: Folder = Field(description="the folder, relative to the case file's")
    size: Literal[14, 28] = Field(default=14, description="pixels a side: 28, or 14 for means of 2 x 2")
    train: Count = Field(default=50000, description="pictures to train on")
    validation: Whole = Field(default=10000, description="others to watch while training")
    test: Count = Field(default=10000, description="pictures of the test files to report on")
    range: Pair = Field(default=[0.0, 1.0], description="what 0 and the brightest become")


# -- networks ------------------------------------------------------------------------------------------------


class NoiseInTraining(Section):
    """Gaussian noise while training, for networks that bear it."""

    std: Positive = Field(description="standard deviation")
    where: Literal["state", "rhs"] = Field(
        default="state", description="added to the state before each step, or to the right-hand side"
    )


class _Network(Section):
    dim: Count | None = Field(default=None, description="of the state; default: that of the inputs")
    activation: Sigma = Field(default="tanh", description="tanh, relu, softplus, sigmoid or identity")
    steps: Count = Field(default=20, description="time steps (layers)")
    lift: Literal["zeros", "linear"] = Field(
        default="zeros", description="of inputs to the state: append zeros, or a learned affine map"
    )
    classifier: Literal["learned", "fixed"] = Field(
        default="learned", description="an affine map of the state, or its first components themselves"
    )


class _Random(_Network):
    gain: Positive = Field(default=1.0, description="size of the random first matrices")
    rough: NotNegative = Field(
        default=0.0, description="of their part that changes with the depth, in units of gain"
    )


class _Node(_Random):
    duration: Positive = Field(default=1.0, description="T of x(0) -> x(T)")
    noise: NoiseInTraining | None = Field(default=None, description="injected while training")


class NetModel(_Random):
    """The plain network y+ = sigma(K y + b)."""

    kind: Literal["net"]
    rough: NotNegative = Field(default=1.0, description="as above; each layer has matrices of its own")


class ResNetModel(_Node):
    """The residual network y+ = y + h sigma(K y + b)."""

    kind: Literal["resnet"]


class ODENetModel(_Node):
    """y+ = y + h alpha sigma(K y + b), alpha learned, one for each layer."""

    kind: Literal["odenet"]


class SimplexModel(_Node):
    """The residual network with learned time steps h_n >= 0 of sum T."""

    kind: Literal["odenet_simplex"]


class RungeKuttaModel(_Node):
    """The residual network with a Runge-Kutta scheme for a layer."""

    kind: Literal["runge_kutta"]
    scheme: Scheme = Field(default="kutta4", description="any of solvers.ode.tableaux")


class StandaloneModel(_Node):
    """x' = sigma(W(t) x + b(t)) alone: the scores are components of x(T)."""

    kind: Literal["standalone"]
    classifier: Literal["fixed"] = Field(default="fixed", description="there is no other")
    scheme: Scheme = Field(default="euler", description="any of solvers.ode.tableaux")
    weights: Literal["linear", "cubic", "constant"] = Field(
        default="linear", description="how they go from knot to knot"
    )
    knots: Count = Field(default=11, description="values of each weight over the depth")


class NonExpansiveModel(_Network):
    """x' = -K(t)^T sigma(K(t) x + b(t)), lift and classifier of norm 1: the whole map is 1-Lipschitz."""

    kind: Literal["nonexpansive"]
    activation: Sigma = Field(
        default="relu", description="of slopes in [0, 1]: tanh, relu, softplus, sigmoid"
    )
    duration: Positive = Field(default=1.0, description="T of x(0) -> x(T)")
    width: Count | None = Field(default=None, description="rows of K; default: dim")
    scheme: Scheme = Field(default="euler", description="one with circle contractivity")
    weights: Literal["linear", "cubic", "constant"] = Field(
        default="linear", description="how they go from knot to knot"
    )
    knots: Count = Field(default=11, description="values of each weight over the depth")


Model = Annotated[
    NetModel
    | ResNetModel
    | ODENetModel
    | SimplexModel
    | RungeKuttaModel
    | StandaloneModel
    | NonExpansiveModel,
    Field(discriminator="kind"),
]

# -- loss and method -----------------------------------------------------------------------------------------


class _Loss(Section):
    scores: Count | None = Field(
        default=None, description="scores a network gives; default: 1 for two classes, else one a class"
    )
    magnitude: NotNegative = Field(default=0.0, description="weight of the scores' own size")


class Squared(_Loss):
    """Least squares to one-hot targets."""

    kind: Literal["squared"]
    targets: Pair = Field(default=[0.0, 1.0], description="of the other classes' scores, and of the label's")
    hypothesis: Literal["sigmoid"] | None = Field(
        default=None, description="sigmoid: compare sigmoid(score); default: the score itself"
    )


class Entropy(_Loss):
    """Cross-entropy."""

    kind: Literal["cross_entropy"]


Loss = Annotated[Squared | Entropy, Field(discriminator="kind")]


class ByConjugateGradients(Section):
    """Nonlinear conjugate gradients in the space of the weights."""

    kind: Literal["conjugate_gradients"]
    variant: Literal["FR", "PR+", "FR-PR", "HS", "DY"] = Field(default="PR+", description="of beta")
    steps: Count = Field(default=6, description="on each mini-batch, or an epoch of the full batch")


class ByLandweber(Section):
    """Gradient descent in the space of the weights."""

    kind: Literal["landweber"]
    step: Positive | Literal["power", "line_search"] = Field(
        default="line_search", description="the step, or how it is found"
    )
    steps: Count = Field(default=1, description="as above")


class ByQuasiNewton(Section):
    """Limited-memory BFGS in the space of the weights."""

    kind: Literal["quasi_newton"]
    memory: Count = Field(default=10, description="pairs kept")
    steps: Count = Field(default=10, description="as above")


class ByAdam(Section):
    """torch.optim.Adam."""

    kind: Literal["adam"]
    lr: Positive = Field(default=1e-3, description="learning rate")
    cosine: bool = Field(default=False, description="whether it falls to 0 as half a cosine")


class BySGD(Section):
    """torch.optim.SGD."""

    kind: Literal["sgd"]
    lr: Positive = Field(default=0.1, description="learning rate")
    momentum: Annotated[Number, Field(ge=0, lt=1)] = Field(default=0.9, description="momentum")
    cosine: bool = Field(default=False, description="as above")


ByMethod = Annotated[
    ByConjugateGradients | ByLandweber | ByQuasiNewton | ByAdam | BySGD, Field(discriminator="kind")
]


class Training(Section):
    """How the weights are found; see inverse.training.train."""

    method: ByMethod = Field(
        default=ByConjugateGradients(kind="conjugate_gradients"), description="which, with its own keys"
    )
    epochs: Count = Field(default=10, description="times that all data are seen")
    batch: Count | None = Field(default=None, description="inputs a mini-batch; default: all at once")
    length: NotNegative = Field(default=0.0, description="length scale of H1 in depth; 0: L2")
    decay: NotNegative = Field(default=0.0, description="weight of the weights' norm in that space")
    patience: Count | None = Field(
        default=None, description="epochs without a lower validation loss before the end; best weights kept"
    )
    max_gradients: Annotated[Whole, Field(ge=2)] | None = Field(
        default=None, description="end when as many are spent"
    )
    checkpoint_every: Count = Field(default=1, description="epochs")
