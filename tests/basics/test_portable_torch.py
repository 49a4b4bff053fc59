"""The kernels that stand in for torch's under portable bits: right, differentiable, vectorised."""

import pytest

from fedsim.basics import kernels_in_use
from tests.basics.processes import run

pytestmark = pytest.mark.skipif(
    kernels_in_use.why_not_portable() is not None, reason="portable bits need AVX2 and MKL"
)

CODE = """
import json
import numpy as np, torch
from torch.func import grad, vmap
from fedsim.basics.portable_torch import replace_kernels

draw = np.random.default_rng(1)
MOST = {"acos": 0.99, "asin": 0.99, "logit": 0.99, "tan": 1.4}
def values(name, dtype):
    return torch.from_numpy(draw.uniform(0.01, MOST.get(name, 9), 1000)).to(dtype)

NAMES = ("acos", "asin", "atan", "log", "log2", "log10", "sqrt", "tan", "logit")
before = {(n, d): (v := values(n, d), getattr(torch, n)(v)) for n in NAMES
          for d in (torch.float32, torch.float64)}
matrix = torch.from_numpy(draw.normal(size=(3, 5, 7))).float()
matrix = matrix @ matrix.mT + torch.eye(5)
factor = torch.linalg.cholesky(matrix)
net = torch.nn.LSTM(3, 5)
sequence = torch.from_numpy(draw.normal(size=(4, 2, 3))).float()
was = net(sequence)[0].detach()

assert replace_kernels() is replace_kernels()
for (name, dtype), (given, expected) in before.items():
    function, into = getattr(torch, name), torch.empty(0, dtype=dtype)
    found = function(given)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    function(given, out=into)
    assert torch.equal(into, found)
    kept = given.clone()
    assert getattr(kept, name + "_")() is kept and torch.equal(kept, found)
    assert torch.equal(function(given.reshape(10, 100).T), found.reshape(10, 100).T)
    assert function(given[:0]).shape == (0,) and function(given[0]).shape == ()
    torch.testing.assert_close(function(given[:4].bfloat16()).float(), found[:4].float(),
                               rtol=0.05, atol=0.05)
    wide = given[:6].double().requires_grad_()
    assert torch.autograd.gradcheck(function, (wide,))
    slopes = vmap(grad(lambda x: function(x).sum()))(given[:6].reshape(2, 3))
    one = torch.stack([grad(lambda x: function(x).sum())(row) for row in given[:6].reshape(2, 3)])
    assert torch.equal(slopes, one)
root = before["sqrt", torch.float32][0]
assert np.array_equal(torch.sqrt(root).numpy(), np.sqrt(root.numpy()))  # rounded as IEEE 754 asks
assert torch.equal(torch._foreach_sqrt([root])[0], torch.sqrt(root))
assert torch.sqrt(torch.tensor([4, 9])).tolist() == [2.0, 3.0]
assert torch.isnan(torch.sqrt(torch.tensor(-1.0)))
assert torch.logit(torch.tensor([0.0, 0.5]), eps=0.1).tolist()[1] == 0.0
torch.testing.assert_close(torch.linalg.cholesky(matrix), factor)
assert torch.linalg.cholesky(matrix).dtype == torch.float32
try:
    torch.linalg.cholesky(-matrix)
except torch.linalg.LinAlgError:
    pass
else:
    raise AssertionError("a matrix that is not positive definite has no factor")
torch.testing.assert_close(net(sequence)[0].detach(), was)
net(sequence)[0].sum().backward()
assert torch.backends.mkldnn.enabled
print(json.dumps("done"))
"""


def test_replaced_kernels_are_torchs_but_for_rounding():
    assert run(CODE) == "done"
