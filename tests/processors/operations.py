"""Every operation that a model or rule may use, computed once; prints a hash of each result.

Run as a script in a process whose kernels are pinned: two processors have portable bits when they
print the same.
"""

import hashlib
import sys

import numpy as np
import torch
import torch.nn.functional as F


def words(text):
    return text.split()


DTYPES = (torch.float32, torch.float64)
ELEMENTWISE = words(
    """exp expm1 exp2 log log1p log2 log10 sqrt rsqrt reciprocal sin cos tan tanh asin acos atan
    sinh cosh erf erfc erfinv sigmoid lgamma digamma logit square"""
)
ACTIVATIONS = words("relu gelu silu softplus mish elu selu hardswish logsigmoid tanhshrink")
REDUCTIONS = words("sum mean var std prod logsumexp softmax log_softmax cumsum norm argsort")
PRODUCTS = [
    (1, 9, 5),
    (5, 3, 10),
    (10, 64, 64),
    (50, 15, 9),
    (16, 17, 30),
    (32, 784, 200),
    (7, 13, 11),
]
CONVOLUTIONS = [(8, 1, 16, 28, 5), (10, 3, 6, 32, 5), (16, 16, 32, 12, 5), (2, 16, 16, 16, 3)]


def draws():
    return np.random.Generator(np.random.PCG64(7))


def operations():
    """Yield the name of each result and its tensors."""
    draw = draws()
    yield from numpy_(draw)
    torch.manual_seed(3)
    for dtype in DTYPES:
        for name, tensors in torch_(draw, dtype):
            yield f"{name}.{str(dtype).removeprefix('torch.')}", tensors


def numpy_(draw):
    for name in ("standard_normal", "standard_exponential", "random"):
        yield f"numpy.{name}", [getattr(draw, name)(4000)]
    yield "numpy.dirichlet", [draw.dirichlet([0.3] * 40, 40), draw.gamma(0.4, size=2000)]
    yield "numpy.others", [draw.lognormal(size=900), draw.beta(0.4, 0.7, 900), draw.zipf(1.7, 900)]
    for dtype in (np.float32, np.float64):
        values = draw.standard_normal(4003).astype(dtype)
        for name in ("exp", "sin", "tanh", "arctan", "cbrt", "mean", "var", "cumsum"):
            yield f"numpy.{name}.{dtype.__name__}", [np.atleast_1d(getattr(np, name)(values))]
        for name in ("log", "log1p", "sqrt"):
            yield f"numpy.{name}.{dtype.__name__}", [getattr(np, name)(np.abs(values) + dtype(0.1))]
        for count in (3, 9, 17, 64):
            one = draw.standard_normal((count, count + 5)).astype(dtype)
            both = one @ one.T
            found = [both, *np.linalg.eigh(both), *np.linalg.svd(one), np.linalg.solve(both, one)]
            yield f"numpy.linalg.{count}.{dtype.__name__}", found


def torch_(draw, dtype):
    def normal(*shape):
        return torch.from_numpy(draw.standard_normal(shape)).to(dtype)

    for count in (7, 64, 1003, 40000):
        values = normal(count)
        inside = values.sigmoid() * 0.98 + 0.01
        for name in ELEMENTWISE:
            yield (
                f"{name}.{count}",
                [getattr(torch, name)(inside), getattr(torch, name)(inside / 2)],
            )
        for name in ACTIVATIONS:
            yield f"{name}.{count}", [getattr(F, name)(values)]
        for name in REDUCTIONS:
            dims = [0] if name in ("logsumexp", "softmax", "log_softmax", "cumsum") else []
            yield f"{name}.{count}", [getattr(torch, name)(values, *dims)]
        yield (
            f"pow.{count}",
            [inside**values, torch.atan2(values, inside), torch.hypot(values, inside)],
        )
        yield (
            f"fused.{count}",
            [torch.lerp(values, inside, 0.3), torch.addcdiv(values, inside, inside)],
        )
    for m, k, n in PRODUCTS:
        one, two = normal(3, m, k), normal(3, k, n)
        name = f"{m}.{k}.{n}"
        yield (
            f"mm.{name}",
            [one[0] @ two[0], F.linear(one[0], two[0].T, two[0, 0]), one[0] @ two[0, :, 0]],
        )
        yield f"bmm.{name}", [one @ two, torch.baddbmm(two[:, :1], one, two), one.mT @ one]
        yield f"einsum.{name}", [torch.einsum("bij,bjk->bik", one, two)]
        yield f"sums.{name}", [one.sum(0), one.sum(1), one.sum(2), torch.linalg.vecdot(one, one)]
        yield (
            f"loss.{name}",
            [F.cross_entropy(one[0], torch.arange(m) % k), F.mse_loss(one[0], one[1])],
        )
        yield f"norms.{name}", [F.layer_norm(one, (k,)), torch.linalg.vector_norm(one, dim=2)]
        yield f"cdist.{name}", [torch.cdist(one, one + 1)]
    for count in (3, 9, 17, 40, 100):
        one = normal(count, count + 3)
        both = one @ one.T
        found = [*torch.linalg.eigh(both), *torch.linalg.svd(one), *torch.linalg.qr(one)]
        found += [torch.linalg.solve(both, one), torch.linalg.inv(both), torch.linalg.det(both)]
        eye = torch.eye(count, dtype=dtype)
        yield (
            f"linalg.{count}",
            [*found, torch.linalg.cholesky(both + eye), torch.matrix_exp(eye / 3)],
        )
    for batch, inner, outer, side, kernel in CONVOLUTIONS:
        images = normal(batch, inner, side, side).requires_grad_()
        weight = normal(outer, inner, kernel, kernel).requires_grad_()
        found = F.conv2d(images, weight, padding=kernel // 2)
        slopes = torch.autograd.grad(found.square().sum(), (images, weight))
        name = f"{batch}.{inner}.{outer}.{side}.{kernel}"
        yield f"conv.{name}", [found, *slopes]
        tripled = torch.cat([images.detach()] * 3, 1)
        yield f"grouped.{name}", [F.conv2d(tripled, torch.cat([weight.detach()] * 3), groups=3)]
        yield f"pools.{name}", [F.max_pool2d(found, 2), F.avg_pool2d(found, 2)]
        yield (
            f"batch_norm.{name}",
            [F.batch_norm(found, None, None, training=True), F.group_norm(found, 2)],
        )
    for kind in (torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM):
        net, steps = kind(9, 17, 2).to(dtype), normal(13, 5, 9)
        found, _ = net(steps)
        yield kind.__name__, [found, *torch.autograd.grad(found.square().sum(), net.parameters())]
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0).to(dtype)
    yield "transformer", [layer(normal(11, 3, 16))]
    fresh = torch.empty(40, 30, dtype=dtype)
    for start in ("kaiming_uniform_", "xavier_normal_", "orthogonal_", "trunc_normal_"):
        yield start, [getattr(torch.nn.init, start)(fresh).clone()]
    yield "draws", [torch.randn(1003, dtype=dtype), torch.rand(1003, dtype=dtype),
                    torch.bernoulli(torch.full((1003,), 0.3, dtype=dtype))]  # fmt: skip


def main():
    from fedsim.basics.kernels_in_use import keep

    torch.set_num_threads(1)
    if sys.argv[1:] == ["portable"]:
        keep("portable")
    for name, tensors in operations():
        digest = hashlib.sha256()
        for each in tensors:
            array = each.detach().numpy() if isinstance(each, torch.Tensor) else each
            digest.update(np.ascontiguousarray(array).tobytes())
        print(name, digest.hexdigest()[:16], flush=True)


if __name__ == "__main__":
    main()
