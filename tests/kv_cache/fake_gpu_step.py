"""Attention over a cache on a GPU that is not there: `python -m tests.kv_cache.fake_gpu_step KV_CACHE QUERIES`.

Prints the kernels that Inductor's wrapper launches and the operators of torch and qcompile that it calls.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fake_gpu import generated, install


def source(kv_cache: str, queries: int) -> str:
    from qcompile.caches import KVCache
    from qcompile.kv_cache import AttentionSpec

    batch, heads, group, length, size = 2, 2, 4, 512, 64
    cache = KVCache(batch, heads, length, size, kv_cache)
    spec = AttentionSpec(key=cache.key_spec, value=cache.value_spec, scale=0.125).encode()

    def attend(query: Tensor, mask: Tensor, filled: Tensor, *tensors: Tensor) -> Tensor:
        return torch.ops.qcompile.attention(query * 2, list(tensors), mask, filled, spec)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        halves = (cache.key_codes, cache.key_scale, cache.value_codes, cache.value_scale)
        tensors = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in halves]
        query = torch.empty(batch, heads * group, queries, size, device="cuda", dtype=torch.bfloat16)
        mask = torch.empty(batch, 1, queries, length, device="cuda", dtype=torch.bool)
        filled = torch.empty((), device="cuda", dtype=torch.int64)
        return generated(attend, query, mask, filled, *tensors)


if __name__ == "__main__":
    install()
    found = source(sys.argv[1], int(sys.argv[2]))
    lines = [line.strip() for line in found.split("\n") if not line.strip().startswith("#")]
    print("\n".join(line for line in lines if ".run(" in line or "= torch.ops." in line))
