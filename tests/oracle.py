"""Dense curvature blocks by `torch.func`: the reference that natgrad is compared with. Imports nothing from `src/`.

Every block is over P, the parameters of one layer as a matrix [W b] with the bias as the last column, in row-major
order; where a layer has B matrices side by side (groups of a convolution), P is (B, out, in+1) and a block (B, ·, ·).
`loss_fn(output, y)` is the whole loss as the user computes it, with its reduction, so the curvature of the reduction
comes from automatic differentiation and from no bookkeeping of ours:

    gradient            ∂loss/∂P
    Hessian             ∂²loss/∂P²
    GGN                 Jᵀ H J                  J = ∂output/∂P,  H = ∂²loss/∂output²
    empirical Fisher    R Σ_n (∂c_n/∂P)(∂c_n/∂P)ᵀ           with loss = R Σ_n c_n

K-FAC goes by the layer's outputs. Let z_r be row r of the layer's output (r runs over data, positions and calls),
x_r the row of its input with a 1 appended where it has a bias, and K = Jzᵀ H Jz the GGN with respect to z, with blocks
K[r, q] of shape (out, out). Since ∂output/∂P = Σ_r ∂output/∂z_r ⊗ x_rᵀ, the GGN is Σ_{r,q} K[r, q] ⊗ x_r x_qᵀ, and

    expand    keeps r = q:            Σ_r K[r, r]                ⊗  mean_r x_r x_rᵀ
    reduce    with datum n's rows r:  Σ_n Σ_{r,q of n} K[r, q]   ⊗  mean_n x̄_n x̄_nᵀ,  x̄_n = mean of n's rows

(Eschenhagen et al. 2023, equations 18 and 22.) Two things make this independent of the product. No row is cut out of an
input: z_r = P x_r is linear in P, so x_r is its derivative, ∂z_r[o]/∂P[o, :], for every kind of layer alike. And no
square root of H is drawn: Jz comes from adding a perturbation to the layer's output. All that a kind of layer brings is
how its parameters make P and how its output splits into rows.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

LossFn = Callable[[Tensor, Tensor], Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def gradient_block(model: nn.Module, params: Sequence[str], x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """Gradient of the loss in P, ([B,] out, in+1)."""
    output, P = _output_of_matrix(model, params, x)
    return _squeeze(jacrev(lambda P: loss_fn(output(P), y))(P))


def hessian_block(model: nn.Module, params: Sequence[str], x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """True Hessian of the loss in P."""
    output, P = _output_of_matrix(model, params, x)
    return _diagonal_blocks(_hessian(lambda P: loss_fn(output(P), y), P), P.shape[0])


def ggn_block(model: nn.Module, params: Sequence[str], x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """Generalized Gauss-Newton matrix of the loss in P."""
    output, P = _output_of_matrix(model, params, x)
    J = jacrev(output)(P).reshape(-1, P.numel())
    return _diagonal_blocks(J.T @ _output_hessian(output(P), y, loss_fn) @ J, P.shape[0])


def empirical_fisher_block(
    model: nn.Module, params: Sequence[str], x: Tensor, y: Tensor, criterion: LossFn, scale: float
) -> Tensor:
    """Empirical Fisher in P, where `criterion` returns c of each datum, shape (N,), and loss = scale·Σ c."""
    output, P = _output_of_matrix(model, params, x)
    g = jacrev(lambda P: criterion(output(P), y))(P).flatten(1)  # (N, numel of P)
    return _diagonal_blocks(scale * g.T @ g, P.shape[0])


def kfac_block(
    model: nn.Module, layers: str | Sequence[str], x: Tensor, y: Tensor, loss_fn: LossFn, sharing: str = "expand"
) -> Tensor:
    """K-FAC's approximation of a layer's GGN block with the exact output curvature.

    Several layers are one whose parameters they share: their calls are calls of it.
    """
    probed = _Probed(model, layers, x)
    J = probed.jacobian(probed.output)  # (*output, B, N, S, out)
    J = J.reshape(-1, *J.shape[-4:])
    H = _output_hessian(probed.output(probed.zeros), y, loss_fn)
    if sharing == "reduce":
        J = J.sum(3, keepdim=True)
    G = torch.einsum("mbnso,mbnsp->bop", J, torch.einsum("mk,kbnso->mbnso", H, J))
    return _kron(G, probed.input_factor(sharing))


def empirical_kfac_block(
    model: nn.Module,
    layers: str | Sequence[str],
    x: Tensor,
    y: Tensor,
    criterion: LossFn,
    scale: float,
    sharing: str = "expand",
) -> Tensor:
    """K-FAC's approximation of a layer's empirical Fisher; `criterion` and `scale` as in `empirical_fisher_block`."""
    probed = _Probed(model, layers, x)
    g = probed.jacobian(lambda d: criterion(probed.output(d), y).sum())  # (B, N, S, out)
    if sharing == "reduce":
        g = g.sum(2, keepdim=True)
    return _kron(scale * torch.einsum("bnso,bnsp->bop", g, g), probed.input_factor(sharing))


def forward_kfac_block(model: nn.Module, layers: str | Sequence[str], x: Tensor, sharing: str = "expand") -> Tensor:
    """K-FAC with the identity for the output's factor: kron(I, A)."""
    probed = _Probed(model, layers, x)
    A = probed.input_factor(sharing)
    out = probed.matrix_shape[1]
    return _kron(torch.eye(out, dtype=A.dtype).expand(A.shape[0], out, out), A)


def layer_params(model: nn.Module, layer: str) -> list[str]:
    """Names of the layer's trainable parameters, as the functions above take them."""
    own = model.get_submodule(layer).named_parameters(recurse=False)
    return [f"{layer}.{name}" if layer else name for name, parameter in own if parameter.requires_grad]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; 0 where both vanish."""
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


# What a kind of layer brings.


def as_matrix(layer: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
    """P, (B, out, in [+ 1]), from tensors like the layer's trainable parameters: its weight, perhaps its bias.

    The scale and shift of a normalization are one column.
    """
    if isinstance(layer, NORMS):
        return torch.cat([t.flatten() for t in tensors]).reshape(1, -1, 1)
    weight, groups = tensors[0], getattr(layer, "groups", 1)
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, *taps)
        by_group = weight.reshape(groups, layer.in_channels // groups, layer.out_channels // groups, -1)
        W = by_group.permute(0, 2, 1, 3).flatten(2)
    elif isinstance(layer, CONVOLUTIONS):
        W = weight.reshape(groups, layer.out_channels // groups, -1)
    elif isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        W = weight.T.unsqueeze(0)
    elif isinstance(layer, nn.Linear):
        W = weight.unsqueeze(0)
    else:
        raise NotImplementedError(f"the oracle does not know {type(layer).__name__}")
    return torch.cat([W, tensors[1].reshape(*W.shape[:2], 1)], 2) if len(tensors) == 2 else W


def output_rows(layer: nn.Module, z: Tensor) -> Tensor:
    """The layer's output, or what has its shape, as rows: (B, N, S, out). A datum's norm is one row."""
    if isinstance(layer, NORMS):
        return z.reshape(1, z.shape[0], 1, -1)
    if isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        return z.reshape(z.shape[0], layer.groups, z.shape[1] // layer.groups, -1).permute(1, 0, 3, 2)
    return z.reshape(1, z.shape[0], -1, z.shape[-1])


def counted_rows(layer: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """Which of the rows (B, N, S, ·) count, (N, S): the padding of an embedding does not."""
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        return (x.reshape(x.shape[0], -1) != layer.padding_idx).to(rows.dtype)
    return torch.ones_like(rows[0, :, :, 0])


class _Probed:
    """A model whose layer notes its inputs, and adds a perturbation to its output at each of its calls."""

    def __init__(self, model: nn.Module, layers: str | Sequence[str], x: Tensor) -> None:
        names = [layers] if isinstance(layers, str) else layers
        self.layer = model.get_submodule(names[0])
        params = [parameter for parameter in self.layer.parameters(recurse=False) if parameter.requires_grad]
        self.matrix_shape = as_matrix(self.layer, params).shape
        keys = [n for n, p in self.layer.named_parameters(recurse=False) if p.requires_grad]
        self.model, self.x, self.calls = _frozen(model), x, list[_Call]()
        self.perturbations: list[Tensor] | None = None
        targets = [self.model.get_submodule(name) for name in names]
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if any(module is target for target in targets):
                if not name:
                    raise ValueError("wrap a model that is a layer itself, as nn.Sequential does")
                self.model.set_submodule(name, _Probe(module, keys, self))
        self.model(x)
        self.zeros = tuple(torch.zeros_like(call.z) for call in self.calls)

    def output(self, perturbations: tuple[Tensor, ...]) -> Tensor:
        """The model's output as a function of what is added to the layer's output at each call."""
        self.perturbations = list(perturbations)
        return self.model(self.x)

    def jacobian(self, function: Callable[[tuple[Tensor, ...]], Tensor]) -> Tensor:
        """Of a function of the perturbations, (*function, B, N, S, out); calls are positions. Rows that do not count
        are zero. For a norm it is the jacobian in each datum's own copy of P.
        """
        parts = []
        for call, J in zip(self.calls, jacrev(function)(self.zeros), strict=True):
            leading = J.shape[: J.ndim - call.z.ndim]
            rows = vmap(lambda z, call=call: output_rows(call.layer, z))(J.reshape(-1, *call.z.shape))
            rows = rows * call.counted.unsqueeze(-1)
            if isinstance(self.layer, NORMS):
                rows = torch.einsum("mbnsz,nzp->mbnsp", rows, call.derivative.flatten(2))
            parts.append(rows.reshape(*leading, *rows.shape[1:]))
        return torch.cat(parts, -2)

    def input_factor(self, sharing: str) -> Tensor:
        """Mean over rows of x xᵀ, where reduce takes the mean over each datum's positions first: (B, in, in)."""
        if isinstance(self.layer, NORMS):
            return torch.ones(1, 1, 1, dtype=self.zeros[0].dtype)
        x = torch.cat([call.rows() for call in self.calls], 2)  # (B, N, S, in)
        counted = torch.cat([call.counted for call in self.calls], 1)  # (N, S)
        if sharing == "expand":
            return torch.einsum("bnsi,bnsj->bij", x, x) / counted.sum()
        A = torch.einsum("bnsi,bntj->bij", x, x) / counted.sum(1).square().sum()
        # Of an embedding natgrad documents that only the diagonal is kept.
        return A.diagonal(dim1=1, dim2=2).diag_embed() if isinstance(self.layer, nn.Embedding) else A


class _Probe(nn.Module):
    """Stands in for a layer."""

    def __init__(self, layer: nn.Module, keys: list[str], probed: _Probed) -> None:
        super().__init__()
        self.layer, self.keys = layer, keys
        self.probed = [probed]  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        (probed,) = self.probed
        z = self.layer(x)
        if probed.perturbations is None:
            probed.calls.append(_Call(self.layer, self.keys, x.clone(), z))  # x may be overwritten in place later
            return z
        return z + probed.perturbations.pop(0)


class _Call:
    """One call of a layer, with the derivative of its output in its own parameters."""

    def __init__(self, layer: nn.Module, keys: list[str], x: Tensor, z: Tensor) -> None:
        self.layer, self.z = layer, z.detach()
        P, back = _matrix(layer, [layer.get_parameter(key) for key in keys])

        def of_matrix(P: Tensor) -> Tensor:
            return functional_call(layer, dict(zip(keys, back(P), strict=True)), (x,))

        rows = output_rows(layer, self.z)
        self.counted = counted_rows(layer, x, rows)
        # of row (b, n, s) and entry o in P: for a norm (N, entries, P)
        self.derivative = jacrev(lambda P: output_rows(layer, of_matrix(P)))(P)
        if isinstance(layer, NORMS):
            self.derivative = self.derivative[0, :, 0].flatten(2)

    def rows(self) -> Tensor:
        """x_r, (B, N, S, in): the derivative of z_r[o] in row o of P, the same for every o, and zero in the others."""
        D = torch.einsum("bnsoboi->bnsoi", self.derivative)
        x = D[:, :, :, 0]
        assert torch.allclose(D, x.unsqueeze(3))
        assert torch.allclose(self.derivative.square().sum(), D.square().sum())
        return x


def _matrix(layer: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """P, and the way back from it."""
    sizes = [t.numel() for t in tensors]
    numbered = torch.arange(sum(sizes)).split(sizes)
    place = as_matrix(layer, [n.reshape(t.shape) for n, t in zip(numbered, tensors, strict=True)]).flatten().argsort()

    def back(P: Tensor) -> list[Tensor]:
        return [v.reshape(t.shape) for v, t in zip(P.flatten()[place].split(sizes), tensors, strict=True)]

    return as_matrix(layer, tensors), back


def _output_of_matrix(model: nn.Module, params: Sequence[str], x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The model's output as a function of P, (B, out, in+1), and the P that the model has."""
    model = _frozen(model)
    layer = model.get_submodule(params[0].rpartition(".")[0])
    P, back = _matrix(layer, [model.get_parameter(name) for name in params])
    return lambda P: functional_call(model, dict(zip(params, back(P), strict=True)), (x,)), P


def _kron(G: Tensor, A: Tensor) -> Tensor:
    return _squeeze(torch.stack(list(map(torch.kron, G, A))))


def _squeeze(blocks: Tensor) -> Tensor:
    return blocks.squeeze(0) if blocks.shape[0] == 1 else blocks


def _diagonal_blocks(whole: Tensor, B: int) -> Tensor:
    return _squeeze(torch.einsum("bibj->bij", whole.reshape(B, whole.shape[0] // B, B, whole.shape[0] // B)))


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
