"""Run by `test_fused.py` under the interpreter of triton: the fused form against the dense one in double precision."""

import itertools
import json
import sys

import torch

from contralto.errors import UsageError
from contralto.losses.contrast import contrast


def draw(seed, n, m, d, dtype):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.nn.functional.normalize(torch.randn(r, d, generator=g), dim=1).to(dtype) for r in (n, m))
    own = torch.randint(-1, m, (n,), generator=g)
    out = torch.randint(-1, m, (n, 2), generator=g)
    out = torch.where(out == own.unsqueeze(1), -1, out)
    return q, k, own, out, 0.05 + torch.rand(n, 1, generator=g), torch.rand(n, generator=g)


def both(q, k, own, out, t, upstream, reduction):
    found = []
    for form, dtype in (("dense", torch.float64), ("fused", q.dtype)):
        a, b = (x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k))
        s = t.detach().to(torch.float64, copy=True).requires_grad_() if isinstance(t, torch.Tensor) else t
        loss = contrast(
            a, b, positives=own, weights=out, temperature=s, normalize=False, reduction=reduction, form=form
        )
        (loss * upstream if reduction == "none" else 1.7 * loss).sum().backward()
        found.append([loss.detach().double(), a.grad.double(), b.grad.double(), *([s.grad] if s is not t else [])])
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-3)) for x, y in zip(*found, strict=True))


def main():
    worst = {}
    shapes = ((1, 1, 3), (5, 70, 16), (70, 65, 70), (66, 130, 300))
    kinds = itertools.product((torch.float32, torch.bfloat16, torch.float16), (True, False), (True, False))
    for (seed, shape), (dtype, leave_out, by_row) in itertools.product(enumerate(shapes), kinds):
        q, k, own, out, t, upstream = draw(seed, *shape, dtype)
        for reduction in ("mean", "none"):
            error = both(q, k, own, out if leave_out else None, t if by_row else 0.1, upstream, reduction)
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
    q, k, own, out, t, upstream = draw(7, 20, 30, 8, torch.float32)
    worst["no positives"] = both(q, k, None, out, 0.1, upstream, "none")
    worst["extreme"] = both(100 * q, k, own, out, 0.01, upstream, "mean")
    worst["nothing left"] = both(
        q[:4], k[:2], torch.tensor([0, 1, 0, -1]), torch.tensor([[0, 1]] * 4), 0.1, upstream[:4], "mean"
    )
    a = q.clone().requires_grad_()
    try:
        torch.autograd.grad(contrast(a, k, positives=own, form="fused"), a, create_graph=True)
    except UsageError as error:
        worst["second derivative"] = str(error)
    json.dump(worst, sys.stdout)


if __name__ == "__main__":
    main()
