"""Dense curvature blocks by `torch.func`: the reference that natgrad is compared with. Imports nothing from `src/`.

Every block is over P = [W b] of one layer, row-major: shape (out·(in+1), out·(in+1)), the bias as the last column, and
W viewed as (out, in·k₁·k₂) where it is a kernel. `loss_fn(output, y)` is the whole loss as the user computes it, with
its reduction, so the curvature of the reduction comes from automatic differentiation and from no bookkeeping of ours:

    gradient            ∂loss/∂P
    Hessian             ∂²loss/∂P²
    GGN                 Jᵀ H J                  J = ∂output/∂P,  H = ∂²loss/∂output²
    empirical Fisher    R Σ_n (∂c_n/∂P)(∂c_n/∂P)ᵀ           with loss = R Σ_n c_n

K-FAC goes by the layer's outputs. Let z_r be row r of the layer's output (r runs over data, positions and calls),
x_r the row of its input with a 1 appended where it has a bias, and K = Jzᵀ H Jz the GGN with respect to z, with blocks
K[r, q] of shape (out, out). Since ∂output/∂P = Σ_r ∂output/∂z_r ⊗ x_rᵀ, the GGN is Σ_{r,q} K[r, q] ⊗ x_r x_qᵀ, and

    expand    keeps r = q:            Σ_r K[r, r]                ⊗  mean_r x_r x_rᵀ
    reduce    with datum n's rows r:  Σ_n Σ_{r,q of n} K[r, q]   ⊗  mean_n x̄_n x̄_nᵀ,  x̄_n = mean of n's rows

(Eschenhagen et al. 2023, equations 18 and 22.) No square root of H is drawn, and Jz comes from adding a perturbation
to the layer's output, so neither the vectors nor the hooks of the product have a counterpart here.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

LossFn = Callable[[Tensor, Tensor], Tensor]


def gradient_block(model: nn.Module, params: Sequence[str], x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """Gradient of the loss in P, shape (out, in+1)."""
    output, P = _output_of_matrix(model, params, x)
    return jacrev(lambda P: loss_fn(output(P), y))(P)


def hessian_block(model: nn.Module, params: Sequence[str], x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """True Hessian of the loss in P."""
    output, P = _output_of_matrix(model, params, x)
    return _hessian(lambda P: loss_fn(output(P), y), P)


def ggn_block(model: nn.Module, params: Sequence[str], x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """Generalized Gauss-Newton matrix of the loss in P."""
    output, P = _output_of_matrix(model, params, x)
    J = jacrev(output)(P).reshape(-1, P.numel())
    return J.T @ _output_hessian(output(P), y, loss_fn) @ J


def empirical_fisher_block(
    model: nn.Module, params: Sequence[str], x: Tensor, y: Tensor, criterion: LossFn, scale: float
) -> Tensor:
    """Empirical Fisher in P, where `criterion` returns c of each datum, shape (N,), and loss = scale·Σ c."""
    output, P = _output_of_matrix(model, params, x)
    g = jacrev(lambda P: criterion(output(P), y))(P).flatten(1)  # (N, numel of P)
    return scale * g.T @ g


def kfac_block(model: nn.Module, layer: str, x: Tensor, y: Tensor, loss_fn: LossFn, sharing: str = "expand") -> Tensor:
    """K-FAC's approximation of the layer's GGN block with the exact output curvature."""
    rows, output, zeros = _perturbed(model, layer, x)
    J = jacrev(output)(zeros)  # (*output, N, S, out)
    N, S, out = zeros.shape
    J = J.reshape(-1, N * S * out)
    K = (J.T @ _output_hessian(output(zeros), y, loss_fn) @ J).reshape(N, S, out, N, S, out)
    G = torch.einsum("nsonsp->op" if sharing == "expand" else "nsontp->op", K)
    return torch.kron(G, _input_factor(rows, sharing))


def empirical_kfac_block(
    model: nn.Module, layer: str, x: Tensor, y: Tensor, criterion: LossFn, scale: float, sharing: str = "expand"
) -> Tensor:
    """K-FAC's approximation of the layer's empirical Fisher; `criterion` and `scale` as in `empirical_fisher_block`."""
    rows, output, zeros = _perturbed(model, layer, x)
    g = jacrev(lambda d: criterion(output(d), y).sum())(zeros)  # (N, S, out)
    g = g.flatten(0, 1) if sharing == "expand" else g.sum(1)
    return torch.kron(scale * g.T @ g, _input_factor(rows, sharing))


def forward_kfac_block(model: nn.Module, layer: str, x: Tensor, sharing: str = "expand") -> Tensor:
    """K-FAC with the identity for the output's factor: kron(I, A)."""
    rows, _, zeros = _perturbed(model, layer, x)
    return torch.kron(torch.eye(zeros.shape[-1], dtype=zeros.dtype), _input_factor(rows, sharing))


def layer_params(model: nn.Module, layer: str) -> list[str]:
    """Names of the layer's weight and bias, as the functions above take them."""
    return [f"{layer}.{name}" for name, _ in model.get_submodule(layer).named_parameters(recurse=False)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; 0 where both vanish."""
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


# A new kind of layer registers two functions: what its rows are, and where its output keeps the channels.


@functools.singledispatch
def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows that the matrix [W b] is applied to, without the appended 1: (N, S, in)."""
    raise NotImplementedError(f"the oracle does not know {type(layer).__name__}")


@functools.singledispatch
def output_rows(layer: nn.Module, z: Tensor) -> Tensor:
    """View of the layer's output z whose rows belong to those of `input_rows`: (N, S, out)."""
    raise NotImplementedError(f"the oracle does not know {type(layer).__name__}")


@input_rows.register(nn.Linear)
def _(layer: nn.Linear, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, layer.in_features)


@output_rows.register(nn.Linear)
def _(layer: nn.Linear, z: Tensor) -> Tensor:
    return z.reshape(z.shape[0], -1, layer.out_features)


class _Probe(nn.Module):
    """Stands in for a layer: notes the input of each call, and adds that call's perturbation to its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.inputs: list[Tensor] = []
        self.perturbations: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.perturbations is None:
            self.inputs.append(x.clone())  # a clone, since x may be overwritten in place later
            return self.layer(x)
        z = self.layer(x)
        return (output_rows(self.layer, z) + self.perturbations.pop(0)).reshape(z.shape)


def _perturbed(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """The layer's input rows (N, S, in[+1]), the model's output as a function of what is added to the layer's rows,
    and the zero (N, S, out) at which to differentiate it. Calls of one layer are positions: they lie along S.
    """
    model = _frozen(model)
    target = model.get_submodule(layer)
    probe = _Probe(target)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is target:
            model.set_submodule(name, probe)
    model(x)
    per_call = [input_rows(target, call) for call in probe.inputs]  # each (N, S of the call, in)
    lengths = [rows.shape[1] for rows in per_call]
    rows = torch.cat(per_call, 1)
    if target.bias is not None:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], 2)

    def output(perturbation: Tensor) -> Tensor:
        probe.perturbations = list(perturbation.split(lengths, 1))
        return model(x)

    return rows, output, rows.new_zeros(*rows.shape[:2], target.weight.shape[0])


def _input_factor(rows: Tensor, sharing: str) -> Tensor:
    """Mean over rows of x xᵀ, where reduce first takes the mean over each datum's positions."""
    flat = rows.flatten(0, 1) if sharing == "expand" else rows.mean(1)
    return flat.T @ flat / flat.shape[0]


def _output_of_matrix(model: nn.Module, params: Sequence[str], x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The model's output as a function of P = [W b], and the P that the model has."""
    model = _frozen(model)
    weight = model.get_parameter(params[0])
    P = weight.flatten(1)
    if len(params) == 2:
        P = torch.cat([P, model.get_parameter(params[1])[:, None]], 1)

    def output(P: Tensor) -> Tensor:
        columns = weight[0].numel()
        values = [P[:, :columns].reshape(weight.shape), P[:, columns]] if len(params) == 2 else [P.reshape_as(weight)]
        return functional_call(model, dict(zip(params, values, strict=True)), (x,))

    return output, P


def _output_hessian(output: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """Hessian of the loss in the flattened output."""
    return _hessian(lambda f: loss_fn(f, y), output)


def _hessian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Hessian of a scalar function in the flattened argument. Reverse over reverse: `torch.func.hessian` goes forward,
    which warns of torch's own use of a deprecated function.
    """
    return jacrev(jacrev(function))(at).reshape(at.numel(), at.numel())


def _frozen(model: nn.Module) -> nn.Module:
    """A copy whose parameters are constants. A model with hooks is refused: they could be the product's."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"layer '{name}' has hooks; compute the oracle before the preconditioner is built")
    return copy.deepcopy(model).requires_grad_(False)
