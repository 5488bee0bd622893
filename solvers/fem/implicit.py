"""Implicit time steps for any UFL residual, differentiable to any order on the tape.

A step solves F(u1, u0, m; v) = 0 for all v. With L(l, u1, u0, m) = F(u1, u0, m; l), so that dL/dl = F, and
A = dF/du1:

    forward    Newton on F (PETSc SNES)
    adjoint    A^T l = g, then the gradients -dL/du0 and -dL/dm                (backward)
    tangent    A du1 = -(dF/du0 du0 + dF/dm dm)                                 (jvp)

Everything but the solves is a derivative of the scalar L, taken by UFL. Three autograd Functions suffice: the
step, the linear solve with A or A^T, and the gradient of a scalar form. The derivatives of each are made of
these, so second derivatives are exact too, in any order of modes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import basix.ufl
import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, DirichletBC, Function, FunctionSpace
from dolfinx.fem.petsc import assemble_matrix, create_matrix
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor
from ufl.algorithms import estimate_total_polynomial_degree, expand_derivatives
from ufl.algorithms.apply_geometry_lowering import apply_geometry_lowering

from solvers.errors import Diverged, GliodeError

Operator = Callable[[Any, Any], ufl.Form]
"""A spatial or mass operator: (u, v) -> Form."""

_prefixes = itertools.count()


class NotConverged(Diverged):
    """Newton's method found no solution of a step."""


class _Variable:
    """A variable of a form: the UFL symbol to differentiate by, and the storage that compiled forms read.

    A Function is its own symbol. UFL does not differentiate by a Constant: a cellwise constant stands in for
    it.
    """

    def __init__(self, value: Function | Constant) -> None:
        self.value = value
        self.is_field = isinstance(value, Function)
        if self.is_field:
            self.symbol = value
            dofmap = value.function_space.dofmap
            self._vector = dolfinx.la.vector(dofmap.index_map, dofmap.index_map_bs)
            self.shape: tuple[int, ...] = (dofmap.index_map.size_local * dofmap.index_map_bs,)
        else:
            mesh = value.ufl_domain()
            element = basix.ufl.element(
                "DG", mesh.ufl_coordinate_element().cell_type, 0, shape=value.ufl_shape
            )
            self.symbol = ufl.Coefficient(ufl.FunctionSpace(mesh, element))
            self.shape = tuple(value.ufl_shape)

    def twin(self) -> _Variable:
        """Another variable of the same space: a direction or a multiplier."""
        if self.is_field:
            return _Variable(Function(self.value.function_space))
        return _Variable(Constant(self.value.ufl_domain(), np.zeros(self.shape)))

    def write(self, data: Any) -> None:
        """Store an array of the owned values (ghosts follow)."""
        if self.is_field:
            self.value.x.array[: self.shape[0]] = data
            self.value.x.scatter_forward()
        else:
            self.value.value = data

    def gradient_form(self, form: ufl.Form) -> tuple[ufl.Form, Constant | None]:
        """The derivative of a scalar form; for a Constant with the direction, to be each unit in turn."""
        if self.is_field:
            return _derivative(form, self.symbol, ufl.TestFunction(self.value.function_space)), None
        unit = self.twin()
        return ufl.replace(_derivative(form, self.symbol, unit.symbol), {unit.symbol: unit.value}), unit.value

    def assemble(self, form: Any, unit: Constant | None) -> Tensor:
        """The compiled derivative: owned dofs summed over ranks; for a Constant this rank's part."""
        if unit is None:
            array = self._vector.array
            array[:] = 0.0
            dolfinx.fem.assemble_vector(array, form)
            self._vector.scatter_reverse(dolfinx.la.InsertMode.add)
            return torch.from_numpy(array[: self.shape[0]].copy())
        result = torch.zeros(self.shape, dtype=torch.float64)
        for index in np.ndindex(*self.shape):
            direction = np.zeros(self.shape)
            direction[index] = 1.0
            unit.value = direction
            result[index] = dolfinx.fem.assemble_scalar(form)
        return result


class _Frozen:
    """What a form reads besides its variables; if that changes after a step, its gradient is refused."""

    def __init__(self, form: ufl.Form, variables: Sequence[_Variable]) -> None:
        known = [variable.value for variable in variables]
        self.items = [c for c in (*form.coefficients(), *form.constants()) if not any(c is k for k in known)]

    def stamp(self) -> list[int]:
        return [hash(_data(item).tobytes()) for item in self.items]

    def check(self, stamp: list[int]) -> None:
        for item, then, now in zip(self.items, stamp, self.stamp(), strict=True):
            if then != now:
                raise GliodeError(
                    f"implicit step: {item} was changed between a step and its gradient; "
                    "list it among the step's parameters and pass its value to each call"
                )


def _data(item: Function | Constant) -> Any:
    return item.x.array if isinstance(item, Function) else item.value


class _Functional:
    """A scalar form of some variables; its gradient is a function on the tape (see `_Gradient`)."""

    def __init__(self, form: ufl.Form, variables: tuple[_Variable, ...], frozen: _Frozen) -> None:
        self.form = form
        self.variables = variables
        self.frozen = frozen
        self._forms: dict[int, tuple[Any, Constant | None]] = {}
        self._along: dict[tuple[int, ...], _Functional] = {}

    def gradient(self, wrt: tuple[int, ...], *values: Tensor) -> tuple[Tensor, ...]:
        """Derivatives by the variables numbered in `wrt`, at the values of all variables."""
        return _Gradient.apply(self, wrt, *values)

    def along(self, indices: tuple[int, ...]) -> _Functional:
        """The derivative along directions of some variables, which become further variables."""
        if indices not in self._along:
            directions = tuple(self.variables[i].twin() for i in indices)
            pairs = zip(indices, directions, strict=True)
            terms = (_derivative(self.form, self.variables[i].symbol, d.symbol) for i, d in pairs)
            form = sum(terms, ufl.Form([]))
            self._along[indices] = _Functional(form, self.variables + directions, self.frozen)
        return self._along[indices]

    def assemble(self, index: int) -> Tensor:
        """The derivative by one variable at the stored values; zero where the form does not depend on it."""
        variable = self.variables[index]
        if index not in self._forms:
            form, unit = variable.gradient_form(self.form)
            self._forms[index] = _compile(form, self.variables), unit
        compiled, unit = self._forms[index]
        if compiled is None:
            return torch.zeros(variable.shape, dtype=torch.float64)
        return variable.assemble(compiled, unit)


def _derivative(form: ufl.Form, symbol: Any, direction: Any) -> ufl.Form:
    """The Gateaux derivative, worked out; an empty form where nothing depends on the symbol."""
    if not form.integrals():
        return form
    result = expand_derivatives(ufl.derivative(form, symbol, direction))
    return result if isinstance(result, ufl.Form) else ufl.Form([])


def _compile(form: ufl.Form, variables: Sequence[_Variable]) -> Any:
    """The compiled form, None for an empty one."""
    return dolfinx.fem.form(_with_constants(form, variables)) if form.integrals() else None


def _with_constants(form: ufl.Form, variables: Sequence[_Variable]) -> ufl.Form:
    """The form with the Constants back in place of their symbols."""
    return ufl.replace(form, {v.symbol: v.value for v in variables if not v.is_field})


def _fix_quadrature(form: ufl.Form) -> ufl.Form:
    """The form with the quadrature degree that FFCx would choose for it written into its integrals.

    Otherwise each derivative gets a degree of its own, and where the integrand is no polynomial (exp(u), say)
    the gradients are not those of the step.
    """
    integrals = []
    for integral in expand_derivatives(form).integrals():
        scale = apply_geometry_lowering(ufl.JacobianDeterminant(integral.ufl_domain()))
        degree = sum(int(np.max(estimate_total_polynomial_degree(e))) for e in (integral.integrand(), scale))
        integrals.append(integral.reconstruct(metadata={"quadrature_degree": degree, **integral.metadata()}))
    return ufl.Form(integrals)


class _Gradient(torch.autograd.Function):
    """(x_1, ..., x_n) -> (dJ/dx_i for i in wrt) of a scalar form J."""

    @staticmethod
    def forward(
        ctx: Any, functional: _Functional, wrt: tuple[int, ...], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.functional, ctx.wrt, ctx.stamp = functional, wrt, functional.frozen.stamp()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*values)
        ctx.save_for_forward(*values)
        for variable, value in zip(functional.variables, values, strict=True):
            variable.write(value.detach().numpy())
        return tuple(functional.assemble(i) for i in wrt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.functional.frozen.check(ctx.stamp)
        wanted = tuple(i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed)
        return (
            None,
            None,
            *_spread(
                len(ctx.needs_input_grad) - 2,
                wanted,
                _hessian(ctx, dict(zip(ctx.wrt, grads, strict=True)), wanted),
            ),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        ctx.functional.frozen.check(ctx.stamp)
        return _hessian(ctx, dict(enumerate(tangents[2:])), ctx.wrt)


def _hessian(ctx: Any, directions: Mapping[int, Tensor | None], wrt: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Rows `wrt` of the (symmetric) Hessian of ctx's functional applied to the directions."""
    given = {i: d for i, d in directions.items() if d is not None}
    return ctx.functional.along(tuple(given)).gradient(wrt, *ctx.saved_tensors, *given.values())


def _spread(n: int, indices: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """A list of n with values at the indices and None elsewhere."""
    result: list[Any] = [None] * n
    for index, value in zip(indices, values, strict=True):
        result[index] = value
    return result


class _Solve(torch.autograd.Function):
    """(b, u1, u0, m...) -> A^-1 b or A^-T b, with b taken as zero on the Dirichlet dofs."""

    @staticmethod
    def forward(ctx: Any, step: ImplicitStep, transposed: bool, b: Tensor, *point: Tensor) -> Tensor:
        x = step._linear_solve(transposed, b, point)
        ctx.step, ctx.transposed, ctx.stamp = step, transposed, step._lagrangian.frozen.stamp()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *point)
        ctx.save_for_forward(x, *point)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        step, count = ctx.step, len(ctx.needs_input_grad)
        step._lagrangian.frozen.check(ctx.stamp)
        if grads[0] is None:
            return (None,) * count
        x, *point = ctx.saved_tensors
        y = _Solve.apply(step, not ctx.transposed, grads[0], *point)
        left, right = (x, y) if ctx.transposed else (y, x)
        wanted = tuple(i for i in range(3, count) if ctx.needs_input_grad[i])
        found = step._lagrangian.along((1,)).gradient(tuple(i - 2 for i in wanted), left, *point, right)
        return tuple(_spread(count, (2, *wanted), (y, *(-f for f in found))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        step = ctx.step
        step._lagrangian.frozen.check(ctx.stamp)
        x, *point = ctx.saved_tensors
        rhs = torch.zeros_like(x) if tangents[2] is None else tangents[2]
        moved = {i - 2: t for i, t in enumerate(tangents) if i > 2 and t is not None}
        if moved:
            # l^T A w is linear in l and in w: the derivative by the one x does not hold is taken at zero.
            bilinear = step._lagrangian.along((1,))
            left, right = (x, torch.zeros_like(x)) if ctx.transposed else (torch.zeros_like(x), x)
            free = len(point) + 1 if ctx.transposed else 0
            change = bilinear.along(tuple(moved)).gradient((free,), left, *point, right, *moved.values())
            rhs = rhs - change[0]
        return _Solve.apply(step, ctx.transposed, rhs, *point)


class _Step(torch.autograd.Function):
    """(u0, m...) -> u1 with F(u1, u0, m; v) = 0."""

    @staticmethod
    def forward(ctx: Any, step: ImplicitStep, *values: Tensor) -> Tensor:
        u1 = step._newton(values)
        ctx.step, ctx.stamp = step, step._lagrangian.frozen.stamp()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u1, *values)
        ctx.save_for_forward(u1, *values)
        return u1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        step, count = ctx.step, len(ctx.needs_input_grad)
        step._lagrangian.frozen.check(ctx.stamp)
        if grads[0] is None:
            return (None,) * count
        point = ctx.saved_tensors
        adjoint = _Solve.apply(step, True, grads[0], *point)
        wanted = tuple(i for i in range(1, count) if ctx.needs_input_grad[i])
        found = step._lagrangian.gradient(tuple(i + 1 for i in wanted), adjoint, *point)
        return tuple(_spread(count, wanted, [-f for f in found]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        step, point = ctx.step, ctx.saved_tensors
        step._lagrangian.frozen.check(ctx.stamp)
        moved = {i + 1: t for i, t in enumerate(tangents) if i > 0 and t is not None}
        change = step._lagrangian.along(tuple(moved)).gradient(
            (0,), torch.zeros_like(point[0]), *point, *moved.values()
        )
        return _Solve.apply(step, False, -change[0], *point)


class ImplicitStep:
    """One implicit step u0 -> u1 of a UFL residual, F(u1, u0, m; v) = 0, differentiable in u0 and all of m.

        step = ImplicitStep(F, u1, u0, [dt, D, rho])  # dt, rho: Constant; D: Function of any space
        u = step(u, 0.5, D_values, rho_value)         # tensors in that order; scalars may be floats

    residual: the one-form F in the dolfinx Functions u1 (unknown) and u0 (known) of one space, be it scalar,
    vector or mixed. parameters: the Functions and Constants whose values each call receives; the step
    overwrites them, u1 and u0. bcs: Dirichlet conditions on u1; their values are no parameters (derivative
    zero). options: PETSc options without prefix, over the defaults (Newton with backtracking to 1e-10; LU by
    MUMPS). A residual linear in u1 takes one solve. The matrix is refilled only when something it depends on
    changes.

    Values are float64 tensors: the owned dofs of a field, the Constant's shape for a scalar. Under MPI a
    scalar is replicated: pass it through `solvers.spaces.replicate`, since the derivative by a scalar is this
    rank's part of the sum (a field's is complete). In forward mode the tangents of scalars are equal on all
    ranks.

    Raises GliodeError where a value does not fit, where a solve fails (with PETSc's reason; where it is
    Newton's method, NotConverged), and in a gradient if a coefficient outside `parameters` was changed after
    the step.
    """

    def __init__(
        self,
        residual: ufl.Form,
        u1: Function,
        u0: Function,
        parameters: Sequence[Function | Constant] = (),
        *,
        bcs: Sequence[DirichletBC] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        space: FunctionSpace = u1.function_space
        arguments = residual.arguments()
        if len(arguments) != 1 or arguments[0].ufl_function_space() != space:
            raise GliodeError(
                "implicit step: the residual must be linear in one TestFunction of the space of u1"
            )
        if u0.function_space != space:
            raise GliodeError("implicit step: u0 and u1 must be Functions of the same space")
        if len({id(f) for f in (u1, u0, *parameters)}) != 2 + len(parameters):
            raise GliodeError("implicit step: u1, u0 and the parameters must be different objects")
        variables = tuple(_Variable(f) for f in (Function(space), u1, u0, *parameters))
        form = ufl.replace(_fix_quadrature(residual), {arguments[0]: variables[0].symbol})
        frozen = _Frozen(form, variables)
        form = ufl.replace(form, {v.value: v.symbol for v in variables if not v.is_field})
        self._lagrangian = _Functional(form, variables, frozen)
        self._names = ["u0", *(getattr(f, "name", str(f)) for f in parameters)]
        self._bcs = list(bcs)
        fixed = [dofs[:owned] for dofs, owned in (bc.dof_indices() for bc in bcs)]
        self._fixed: np.ndarray[Any, Any] = np.unique(np.concatenate([np.zeros(0, np.int32), *fixed]))
        self._comm: MPI.Comm = space.mesh.comm

        F = _derivative(form, variables[0].symbol, ufl.TestFunction(space))
        J = _derivative(F, u1, ufl.TrialFunction(space))
        if not J.integrals():
            raise GliodeError("implicit step: the residual does not depend on u1")
        self._jacobian = _compile(J, variables)
        J = _with_constants(J, variables)
        self._dependencies = [*J.coefficients(), *J.constants()]
        self._seen: list[Any] | None = None
        self._matrix = create_matrix(self._jacobian)
        self._solution, self._residual = self._matrix.createVecs()
        linear = all(item is not u1 for item in self._dependencies)
        self._snes = _newton_solver(self._comm, linear, options)
        self._snes.setFunction(self._evaluate, self._residual)
        self._snes.setJacobian(self._update, self._matrix)
        self._snes.setUp()
        self._ksp = self._snes.getKSP()

    def __call__(self, u0: Tensor, *values: Tensor | float) -> Tensor:
        """u1, (owned dofs,)."""
        given = (u0, *values)
        variables = self._lagrangian.variables[2:]
        if len(given) != len(variables):
            raise GliodeError(f"implicit step: {len(values)} parameter values for {self._names[1:]}")
        tensors = []
        for name, variable, value in zip(self._names, variables, given, strict=True):
            tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
            if tuple(tensor.shape) != variable.shape or tensor.dtype != torch.float64:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise GliodeError(f"implicit step: {name} is {found}, expected float64 {variable.shape}")
            tensors.append(tensor)
        return _Step.apply(self, *tensors)

    def _newton(self, values: Sequence[Tensor]) -> Tensor:
        for variable, value in zip(self._lagrangian.variables[2:], values, strict=True):
            variable.write(value.detach().numpy())
        u1 = self._lagrangian.variables[1].value
        u1.x.array[:] = self._lagrangian.variables[2].value.x.array
        for bc in self._bcs:
            bc.set(u1.x.array)
        self._solution.array_w[:] = u1.x.array[: self._solution.local_size]
        self._snes.solve(None, self._solution)
        reason = self._snes.getConvergedReason()
        if reason < 0 or not np.isfinite(self._solution.norm()):
            raise NotConverged(
                f"implicit step: Newton did not converge ({_reason(PETSc.SNES, reason)} after "
                f"{self._snes.getIterationNumber()} iterations, norm of u1 {self._solution.norm():.1e}); "
                "try a smaller time step, or check the parameters for values that make no sense"
            )
        return torch.from_numpy(self._solution.array_r.copy())

    def _linear_solve(self, transposed: bool, b: Tensor, point: Sequence[Tensor]) -> Tensor:
        for variable, value in zip(self._lagrangian.variables[1:], point, strict=True):
            variable.write(value.detach().numpy())
        self._refill()
        self._ksp.setOperators(self._matrix)
        self._residual.array_w[:] = b.detach().numpy()
        self._residual.array_w[self._fixed] = 0.0
        (self._ksp.solveTranspose if transposed else self._ksp.solve)(self._residual, self._solution)
        if (reason := self._ksp.getConvergedReason()) < 0:
            kind = "adjoint" if transposed else "tangent"
            raise GliodeError(
                f"implicit step: the {kind} solve did not converge ({_reason(PETSc.KSP, reason)})"
            )
        return torch.from_numpy(self._solution.array_r.copy())

    def _evaluate(self, snes: Any, x: Any, f: Any) -> None:
        self._lagrangian.variables[1].write(x.array_r)
        f.array_w[:] = self._lagrangian.assemble(0).numpy()
        f.array_w[self._fixed] = 0.0

    def _update(self, snes: Any, x: Any, matrix: Any, preconditioner: Any) -> None:
        self._lagrangian.variables[1].write(x.array_r)
        self._refill()

    def _refill(self) -> None:
        """Assemble A at the stored values unless nothing it depends on has changed on any rank."""
        data = [_data(item) for item in self._dependencies]
        same = self._seen is not None and all(map(np.array_equal, data, self._seen))
        if self._comm.allreduce(same, MPI.LAND):
            return
        self._seen = [array.copy() for array in data]
        self._matrix.zeroEntries()
        assemble_matrix(self._matrix, self._jacobian, self._bcs)
        self._matrix.assemble()


def _newton_solver(comm: MPI.Comm, linear: bool, options: Mapping[str, Any] | None) -> Any:
    snes = PETSc.SNES().create(comm)
    prefix = f"gliode_implicit_{next(_prefixes)}_"
    snes.setOptionsPrefix(prefix)
    chosen = {
        "snes_type": "ksponly" if linear else "newtonls",
        "snes_rtol": 1e-10,
        "snes_stol": 1e-12,
        "snes_max_it": 25,
        "ksp_type": "preonly",
        "ksp_rtol": 1e-10,
        "pc_type": "lu",
        "pc_factor_mat_solver_type": "mumps",
        **(options or {}),
    }
    database = PETSc.Options()
    for key, value in chosen.items():
        database[prefix + key] = value
    snes.setFromOptions()
    for key in chosen:
        del database[prefix + key]
    return snes


def _reason(kind: Any, reason: int) -> str:
    names = {value: name for name, value in vars(kind.ConvergedReason).items() if isinstance(value, int)}
    return names.get(reason, str(reason))


def l2(u: Any, v: Any) -> ufl.Form:
    """The consistent L2 mass form."""
    return ufl.inner(u, v) * ufl.dx


def theta_residual(
    spatial: Operator,
    u1: Function,
    u0: Function,
    v: Any,
    dt: Any,
    theta: float = 0.5,
    *,
    mass: Operator = l2,
    time: Constant | None = None,
) -> ufl.Form:
    """mass(u1 - u0, v) - dt [theta f(u1; v) + (1 - theta) f(u0; v)]: mass(u_t, v) = f(u; v) = spatial(u, v).

    theta = 1/2: trapezoidal rule, second order, A-stable; theta = 1: implicit Euler, first order, L-stable.
    dt: a Constant, or an expression of Constants. time: the Constant that `spatial` reads as the time,
    holding the start of the step; f(u1) then reads time + dt. A lumped mass:
    `mass=lambda u, v: u * v * ufl.dx(metadata={"quadrature_rule": "vertex", "quadrature_degree": 1})`.
    """
    after = spatial(u1, v)
    if time is not None:
        after = ufl.replace(after, {time: time + dt})
    F = mass(u1 - u0, v) - dt * theta * after
    return F if theta == 1 else F - dt * (1 - theta) * spatial(u0, v)


def theta_step(
    spatial: Operator,
    space: FunctionSpace,
    parameters: Sequence[Function | Constant] = (),
    theta: float = 0.5,
    *,
    mass: Operator = l2,
    time: Constant | None = None,
    bcs: Sequence[DirichletBC] = (),
    options: Mapping[str, Any] | None = None,
) -> ImplicitStep:
    """The theta scheme of `theta_residual` as step(u, dt, *values), values in the order of `parameters`."""
    u1, u0, dt = Function(space), Function(space), Constant(space.mesh, 0.0)
    u1.name, u0.name, dt.name = "u1", "u0", "dt"
    F = theta_residual(spatial, u1, u0, ufl.TestFunction(space), dt, theta, mass=mass, time=time)
    return ImplicitStep(F, u1, u0, [dt, *parameters], bcs=bcs, options=options)


class Sdirk2Step:
    """Two-stage L-stable SDIRK of order 2 (Alexander 1977) as step(u, dt, *values); gamma = 1 - 1/sqrt(2).

        M(Y1 - u0) = gamma dt f(Y1),   M(u1 - u0) = (1 - gamma) dt f(Y1) + gamma dt f(u1)

    With dt f(Y1) taken from the first equation, the second is the first again, from
    w = u0 + (1/gamma - 1)(Y1 - u0): implicit Euler by gamma dt, applied twice, with one matrix. Arguments as
    for `theta_step`, but `time`, where given, must be among the parameters: its value is the step's start.
    """

    gamma = 1.0 - 0.5**0.5

    def __init__(
        self,
        spatial: Operator,
        space: FunctionSpace,
        parameters: Sequence[Function | Constant] = (),
        *,
        mass: Operator = l2,
        time: Constant | None = None,
        bcs: Sequence[DirichletBC] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._time = next((i for i, p in enumerate(parameters) if p is time), None)
        if time is not None and self._time is None:
            raise GliodeError("SDIRK step: list `time` among the parameters, so that each stage can set it")
        self._euler = theta_step(spatial, space, parameters, 1.0, mass=mass, bcs=bcs, options=options)

    def __call__(self, u0: Tensor, dt: Tensor | float, *values: Tensor | float) -> Tensor:
        """u1, (owned dofs,)."""
        Y1 = self._euler(u0, self.gamma * dt, *self._at(self.gamma * dt, values))
        w = u0 + (1.0 / self.gamma - 1.0) * (Y1 - u0)
        return self._euler(w, self.gamma * dt, *self._at(dt, values))

    def _at(self, offset: Tensor | float, values: tuple[Tensor | float, ...]) -> list[Tensor | float]:
        """The values with the time moved on by an offset."""
        return [value + offset if i == self._time else value for i, value in enumerate(values)]
