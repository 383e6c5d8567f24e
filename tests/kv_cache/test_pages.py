"""Paged caches: who has which page, what is stored where, and attention over them, eager and compiled."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompile.caches import KVCache, PagedKVCache
from qcompile.errors import CacheFullError
from qcompile.kv_cache import decode_attention_spec
from qcompile.pages import PageTable
from qcompile.passes.quantize_attention import ATTENTION, RULE
from tests import tolerance
from tests.capture import capture

SCHEMES: tuple[Any, ...] = ("fp8", "fp8_e5m2", "int8", "int4", {"format": "int8", "scales": "token", "group": 16})
HEADS, GROUP, SIZE = 2, 2, 16


def states(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, HEADS, tokens, SIZE), torch.randn(rows, HEADS, tokens, SIZE)


def caches(batch: int, max_length: int, kv_cache: Any = "int8", **options: int) -> tuple[PageTable, PagedKVCache]:
    pages = PageTable(batch, max_length, **options)
    return pages, PagedKVCache(pages, HEADS, SIZE, kv_cache, dtype=torch.float32)


def stored(pages: PageTable, cache: PagedKVCache, row: int) -> tuple[Tensor, Tensor]:
    """The keys and values of a sequence, [heads, tokens, size]."""
    table, lengths = pages.of(torch.tensor([row]))
    read, halves = torch.ops.qcompile.dequantize_kv, []
    for codes, scale, spec in (
        (cache.key_codes, cache.key_scale, cache.key_spec),
        (cache.value_codes, cache.value_scale, cache.value_spec),
    ):
        whole = read(codes, scale, lengths, spec.encode(), torch.float32, block_table=table)[0]
        assert not whole[:, pages.length(row) :].any()
        halves.append(whole[:, : pages.length(row)])
    return halves[0], halves[1]


@pytest.mark.parametrize("kv_cache", SCHEMES, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_pages_hold_what_one_tensor_does(kv_cache: Any, page_size: int) -> None:
    pages, cache = caches(3, 100, kv_cache, page_size=page_size)
    plain = KVCache(3, HEADS, 100, SIZE, kv_cache, dtype=torch.float32)
    rows = [pages.add() for _ in range(3)]
    for tokens in (7, 1, 16, 40):
        key, value = states(3, tokens)
        position = torch.arange(tokens) + pages.length(0)
        pages.append(tokens)
        found = cache.update(key, value)
        expected = plain.update(position, key, value)
        length = pages.length(0)
        assert all(torch.equal(a[:, :, :length], b[:, :, :length]) for a, b in zip(found, expected, strict=True))
    for row in rows:
        assert torch.equal(stored(pages, cache, row)[0], expected[0][row, :, :length])


def test_padding_on_the_left_is_stored_nowhere() -> None:
    pages, cache = caches(2, 32, page_size=4)
    pages.add(), pages.add()
    pages.append((9, 3))
    key, value = states(2, 9)
    cache.update(key, value)
    alone, other = caches(1, 32, page_size=4)
    alone.add()
    alone.append(3)
    other.update(key[1:, :, 6:], value[1:, :, 6:])
    assert torch.equal(stored(pages, cache, 1)[0], stored(alone, other, 0)[0])
    assert pages.positions(9)[1].tolist() == list(range(-6, 3))
    mask = pages.mask(9)
    assert mask.shape == (2, 1, 9, 32)
    assert not mask[1, 0, :6].any()
    assert torch.equal(mask[1, 0, 6:, :3], torch.ones(3, 3, dtype=torch.bool).tril())
    assert pages.mask(1, window=2)[0, 0, 0].nonzero().flatten().tolist() == [7, 8]


def test_a_common_beginning_is_shared_and_copied_when_written() -> None:
    pages, cache = caches(3, 40, page_size=8)
    first = pages.add()
    pages.append(20)
    cache.update(*states(1, 20), rows=torch.tensor([first]))
    before = stored(pages, cache, first)
    free = pages.free_pages
    second, third = pages.fork(first), pages.fork(first)
    assert pages.free_pages == free
    assert torch.equal(pages.block_table[first], pages.block_table[third])
    key, value = states(3, 1)
    pages.append()
    assert pages.free_pages == free - 2  # the last of three keeps the page
    assert len(set(pages.block_table[:, 2].tolist())) == 3
    cache.update(key, value)
    for row in (first, second, third):
        keys, values = stored(pages, cache, row)
        assert torch.equal(keys[:, :20], before[0])
        assert torch.equal(values[:, :20], before[1])
    assert not torch.equal(stored(pages, cache, second)[0], stored(pages, cache, third)[0])
    pages.free(first)
    assert torch.equal(stored(pages, cache, second)[0][:, :20], before[0])


def test_room_that_runs_out_says_so_and_changes_nothing() -> None:
    pages = PageTable(2, 30, pages=3, page_size=8)
    pages.add(), pages.add()
    with pytest.raises(CacheFullError, match=r"all 2 rows of the page table have a sequence; free\(row\)"):
        pages.add()
    pages.append(16, rows=[0])
    state = pages.block_table.clone(), pages.lengths.clone(), pages.free_pages
    message = r"17 tokens of 2 sequences need 3 more pages of 8, and 1 of 3 are free; free\(row\)"
    with pytest.raises(CacheFullError, match=message):
        pages.append((1, 16))
    with pytest.raises(CacheFullError, match="row 0 of the page table would have 31 tokens, more than its max_length"):
        pages.append(15, rows=[0])
    assert torch.equal(state[0], pages.block_table)
    assert torch.equal(state[1], pages.lengths)
    assert state[2] == pages.free_pages
    for call in (lambda: pages.length(2), lambda: pages.free(-1), lambda: pages.truncate(0, 17)):
        with pytest.raises(
            ValueError, match=r"no sequence; those that do are \[0, 1\]|has 16 tokens and cannot be cut"
        ):
            call()
    pages.truncate(0, 8)
    pages.append((1, 8))
    with pytest.raises(ValueError, match="holds nothing"):
        PageTable(2, 0)


def test_pages_before_a_window_are_free_again() -> None:
    """Eager and compiled steps give what they give where all pages stay."""
    table = {"page_size": 8, "pages": 12}
    kept, freed = caches(2, 48, **table), caches(2, 48, window=10, **table)
    steps = [(30, (0,)), (3, (0,)), (1, (0, 1)), (9, (0,)), (1, (0, 1))]
    for pages, _ in (kept, freed):
        pages.add(), pages.add()
    for tokens, rows in steps:
        query, given_ = torch.randn(len(rows), HEADS * GROUP, tokens, SIZE), states(len(rows), tokens)
        results = []
        for pages, cache in (kept, freed):
            pages.append(tokens, rows=rows)
            which = torch.tensor(rows)

            def attend(query: Tensor, key: Tensor, value: Tensor, pages: Any = pages, cache: Any = cache) -> Tensor:
                keys, values = cache.update(key, value, rows=which)  # noqa: B023
                mask = pages.mask(query.shape[2], which, window=10)  # noqa: B023
                return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

            results += [attend(query, *given_), capture(attend, query, *given_).output]
        for other in results[1:]:
            assert tolerance.sqnr(results[0], other) > tolerance.rewrite_sqnr_floor(4, 64 * SIZE)
    pages = freed[0]
    assert (pages.length(0), kept[0].length(0)) == (44, 44)
    assert pages.block_table[0, :4].tolist() == [0] * 4  # the last token attends from position 34 on
    assert pages.block_table[0, 4:6].all()
    assert pages.free_pages == kept[0].free_pages + 4
    pages.free(1)
    pages.append(1, rows=[pages.fork(0), 0])
    with pytest.raises(ValueError, match="cannot be cut to 40 tokens: pages of the window before them are free"):
        pages.truncate(0, 40)
    pages.truncate(0, 43)
    pages.free(0), pages.free(1)
    assert pages.free_pages == 12
    with pytest.raises(ValueError, match="a window is a number of tokens"):
        PageTable(1, 8, window=-1)


@given(st.lists(st.tuples(st.sampled_from(["add", "append", "fork", "free", "truncate"]), st.integers(0, 40))))
def test_no_page_has_two_owners_that_write(steps: list[tuple[str, int]]) -> None:
    """Random histories: sequences keep what they stored, and all pages come back."""
    pages, cache = caches(3, 40, page_size=8, pages=9)
    kept: dict[int, Tensor] = {}
    for what, number in steps:
        rows = pages.rows
        row = rows[number % len(rows)] if rows else None
        try:
            if what == "add":
                kept[pages.add()] = torch.zeros(HEADS, 0, SIZE)
            elif row is None:
                continue
            elif what == "append":
                tokens = number % 11
                pages.append(tokens, rows=[row])
                if tokens:
                    cache.update(*states(1, tokens), rows=torch.tensor([row]))
                    new = stored(pages, cache, row)[0][:, -tokens:]
                    kept[row] = torch.cat([kept[row], new], 1)
            elif what == "fork":
                kept[pages.fork(row)] = kept[row]
            elif what == "free":
                pages.free(row)
                del kept[row]
            else:
                length = min(number, pages.length(row))
                pages.truncate(row, length)
                kept[row] = kept[row][:, :length]
        except CacheFullError:
            pass
        assert pages.rows == sorted(kept)
        for row, keys in kept.items():
            assert torch.equal(stored(pages, cache, row)[0], keys)
    for row in pages.rows:
        pages.free(row)
    assert pages.free_pages == 9
    assert not pages.block_table.any()
    assert not pages.lengths.any()


class Model(nn.Module):
    """Attention as a model of one's own writes it, over a paged cache."""

    def __init__(self, lengths: tuple[int, ...], kv_cache: Any, window: int = 0, page_size: int = 8) -> None:
        super().__init__()
        self.window = window
        self.pages, self.cache = caches(len(lengths), 64, kv_cache, page_size=page_size)
        for length in lengths:
            row = self.pages.add()
            self.pages.append(length, rows=[row])
            self.cache.update(*states(1, length), rows=torch.tensor([row]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.update(key, value)
        mask = self.pages.mask(query.shape[2], window=self.window)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("kv_cache", SCHEMES, ids=str)
@pytest.mark.parametrize(("tokens", "window"), [(1, 0), (1, 5), (3, 0), (3, 5)])
def test_attention_reads_the_pages(kv_cache: Any, tokens: int, window: int) -> None:
    model = Model((17, 1, 32), kv_cache, window)
    model.pages.append(tokens)
    inputs = torch.randn(3, HEADS * GROUP, tokens, SIZE), *states(3, tokens)
    plain = copy.deepcopy(model)(*inputs)
    captured = capture(model, *inputs)
    assert captured.declined(RULE) == []
    assert captured.count(ATTENTION) == 1
    assert captured.count(torch.ops.qcompile.dequantize_kv) == 0
    (node,) = (n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION)
    spec = decode_attention_spec(node.args[4])
    assert (spec.causal, spec.window) == (True, window)
    assert node.args[2] is None
    assert set(node.kwargs) == {"block_table"}
    assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, 64 * SIZE)


def test_other_masks_stay() -> None:
    class Masked(Model):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            keys, values = self.cache.update(key, value)
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

    model = Masked((17, 1, 32), "int8")
    model.pages.append(1)
    inputs = torch.randn(3, HEADS * GROUP, 1, SIZE), *states(3, 1)
    mask = model.pages.mask(1) & (torch.rand(3, 1, 1, 64) < 0.8)
    plain = copy.deepcopy(model)(*inputs, mask)
    captured = capture(model, *inputs, mask)
    (node,) = (n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION)
    assert set(node.kwargs) == {"block_table", "start"}
    assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, 64 * SIZE)
    (reason,) = set(capture(model, *inputs, None).declined(RULE))
    assert re.search(r"it has no mask, and sequences in a paged cache have lengths of their own", reason)


def test_steps_of_any_length_are_one_graph() -> None:
    """Compiled by Inductor: lengths and pages change, no graph is made anew, and results are those of eager mode."""
    eager = Model((17, 1, 32), "fp8")
    model = copy.deepcopy(eager)
    fast = torch.compile(model, backend="qcompile", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(9):
            inputs = torch.randn(3, HEADS * GROUP, 1, SIZE), *states(3, 1)
            if step == 5:  # a sequence ends, and another takes its row
                for pages in (eager.pages, model.pages):
                    pages.free(1)
                    assert pages.add() == 1
            for pages in (eager.pages, model.pages):
                pages.append()
            plain = eager(*inputs)
            found = fast(*inputs)
            assert tolerance.sqnr(plain, found) > tolerance.rewrite_sqnr_floor(4, 64 * SIZE)
            assert torch.equal(eager.cache.key_codes[1:], model.cache.key_codes[1:])
    torch.compiler.reset()
