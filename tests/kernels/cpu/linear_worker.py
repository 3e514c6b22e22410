"""`python -m tests.kernels.cpu.linear_worker`: the products on the variant that ELISION_ISA asks for.

Every product against its emulation, and its rows alone, in other company and on other numbers of threads: the bits must
not change. Prints the variant and how many products agreed."""

from __future__ import annotations

import numpy as np
import torch
from elision.kernels import cpu

from .linear_draws import Product, emulated, product, products


def pack(p: Product) -> torch.Tensor:
    return cpu.pack_weight(*p.parts, bits=p.bits, group=p.group, width=p.x.shape[-1])


def packed_product(x: torch.Tensor, packed: torch.Tensor, p: Product) -> torch.Tensor:
    channels = p.parts[0].shape[0]  # type: ignore[union-attr]
    return torch.ops.elision_cpu.linear_packed(x, packed, p.bias, channels=channels)


def check(p: Product) -> None:
    packed = pack(p)
    found = packed_product(p.x, packed, p)
    expected, rounding = (
        emulated(p),
        {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[found.dtype],
    )
    size = np.abs(expected).max() + 1e-6
    if not np.allclose(found.float().numpy(), expected, rtol=rounding, atol=rounding * size):
        raise SystemExit(f"{p.label}: off by {np.abs(found.float().numpy() - expected).max() / size}")


def check_rows(whole: torch.Tensor, run) -> None:  # type: ignore[no-untyped-def]
    """run(rows) for every number of rows and several numbers of threads: each row's bits are those among all."""
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (*range(1, 20), 31, 32, 33, 63, 64, 250):
            first = (rows * 7) % (251 - rows)
            if not torch.equal(run(slice(first, first + rows)), whole[first : first + rows]):
                raise SystemExit(f"other bits for {rows} rows on {threads} threads")


def main() -> None:
    cpu.kernels()
    count = 0
    for p in products():
        check(p)
        count += 1
    for bits, group, zeros in ((4, 32, "none"), (4, 128, "floats"), (8, 16, "none"), (8, 32, "ints")):
        p = product(bits, 250, 70, 160, bits, group, zeros)
        packed = pack(p)
        check_rows(
            packed_product(p.x, packed, p), lambda rows, p=p, w=packed: packed_product(p.x[rows], w, p)
        )
    x = torch.randn(250, 100)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.randn(70, 100).to(dtype)
        packed = cpu.pack_weight(weight, bits=8 * weight.element_size(), width=100)

        def rows_of(rows: slice, packed: torch.Tensor = packed) -> torch.Tensor:
            return torch.ops.elision_cpu.linear_packed(x[rows], packed, channels=70)

        whole = rows_of(slice(0, 250))
        torch.testing.assert_close(whole, x @ weight.float().T, rtol=1e-5, atol=1e-4)
        check_rows(whole, rows_of)

        def largest(rows: slice, packed: torch.Tensor = packed) -> torch.Tensor:
            norm = torch.linspace(0.5, 2, 100)
            values, places = torch.ops.elision_cpu.linear_topk_packed(
                x[rows], packed, None, norm, channels=70, k=9
            )
            return torch.cat([values, places.float()], -1)

        check_rows(largest(slice(0, 250)), largest)
    print(cpu.variant(), count)


if __name__ == "__main__":
    main()
