"""Which pages of a paged KV cache each sequence of a batch has: the block table, and who may write where.

As in "Efficient Memory Management for Large Language Model Serving with PagedAttention" (W. Kwon et al., 2023):
sequences take a page when they need one, give all back when they end, and share those of a common beginning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

import qcompile.attention  # noqa: F401  (registers the operators)
from qcompile import compat
from qcompile.errors import CacheFullError


class Paged(Protocol):
    """Something that keeps tokens in pages that a `PageTable` hands out."""

    def copy_page(self, source: int, target: int) -> None:
        """Let a page hold what another one does."""


class PageTable:
    """The pages of a batch of sequences; one for all layers of a model.

    A sequence is a row of the batch. Page 0 belongs to none: what rows without a sequence store goes there.

    Attributes:
        block_table: int32 [batch, most pages of a sequence]; 0 where a sequence has no page.
        lengths: int64 [batch], tokens of each sequence, those of the step under way included; 0 without a sequence.

    Both keep their addresses, and change between steps only, so that compiled graphs and CUDA graphs read them.

    Args:
        batch: rows.
        max_length: the most tokens of a sequence.
        pages: of all sequences together; unless given, as many as all of them can need.
        page_size: tokens of a page. On GPUs 64 and more are read with the fewest instructions.
        window: to how many tokens a token attends at most in every layer, itself among them; 0 for all before it.
            Pages that lie wholly before it are free again, and page 0 stands for them.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(
        self,
        batch: int,
        max_length: int,
        *,
        pages: int | None = None,
        page_size: int = 64,
        window: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        most = -(-max_length // page_size) if page_size > 0 else 0
        pages = batch * most if pages is None else pages
        if min(batch, max_length, page_size, pages) < 1:
            raise ValueError(f"a page table of {batch} rows, {pages} pages and {page_size} tokens a page holds nothing")
        if window < 0:
            raise ValueError(f"a window is a number of tokens, or 0 for all, not {window}")
        self.batch, self.max_length, self.page_size, self.pages = batch, max_length, page_size, pages
        self.window = window
        self.block_table = torch.zeros(batch, most, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        compat.mark_static(self.block_table, self.lengths)
        self._caches: list[Paged] = []
        self._pages: list[list[int] | None] = [None] * batch
        self._counts = [0] * batch
        self._users = [0] * (pages + 1)
        self._free = list(range(pages, 0, -1))

    @property
    def rows(self) -> list[int]:
        """Those that have a sequence."""
        return [row for row, pages in enumerate(self._pages) if pages is not None]

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    def length(self, row: int) -> int:
        """Tokens of a sequence."""
        self._pages_of(row)
        return self._counts[row]

    def of(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block table and the lengths of some rows, integers [b]; or of all."""
        if rows is None:
            return self.block_table, self.lengths
        return self.block_table[rows], self.lengths[rows]

    def positions(self, tokens: int, rows: Tensor | None = None) -> Tensor:
        """Where the last tokens of each row are in its sequence: int64 [b, tokens].

        Of a sequence that has fewer, the first are below 0: they are padding on the left, and stored nowhere.
        """
        return torch.arange(tokens, device=self.lengths.device) - tokens + self.of(rows)[1][:, None]

    def mask(self, tokens: int, rows: Tensor | None = None, *, window: int = 0) -> Tensor:
        """What the last tokens of each row attend to, for attention to what a cache returns: bool [b, 1, tokens, T].

        Args:
            window: to how many tokens one attends at most, itself among them; 0 for all before it.
        """
        context = self.block_table.shape[1] * self.page_size
        mask: Tensor = torch.ops.qcompile.kv_mask(self.of(rows)[1], tokens, context, window)
        return mask

    def attach(self, cache: Paged) -> None:
        """Let a cache know of pages that must be copied."""
        self._caches.append(cache)

    def add(self) -> int:
        """A row for a new sequence.

        Raises:
            CacheFullError: all rows have one.
        """
        row = next((row for row, pages in enumerate(self._pages) if pages is None), None)
        if row is None:
            raise CacheFullError(f"all {self.batch} rows of the page table have a sequence; free(row) one that ended")
        self._pages[row] = []
        return row

    def fork(self, row: int) -> int:
        """A row for a new sequence that begins with all tokens of another, whose pages it shares.

        The last page is copied once either of them goes on in it.

        Raises:
            CacheFullError: see `add`.
        """
        shared = self._pages_of(row)
        new = self.add()
        for page in filter(None, shared):
            self._users[page] += 1
        self._pages[new], self._counts[new] = list(shared), self._counts[row]
        self._publish([new])
        return new

    def free(self, row: int) -> None:
        """End a sequence; its row and the pages that no other has are free again."""
        self._release(self._pages_of(row))
        self._pages[row], self._counts[row] = None, 0
        self._publish([row])

    def truncate(self, row: int, length: int) -> None:
        """Forget a sequence's tokens from `length` on, as after drafts that were refused.

        Raises:
            ValueError: it has fewer tokens, or pages that those that stay attend to are free already.
        """
        pages, count = self._pages_of(row), self._counts[row]
        if not 0 <= length <= count:
            raise ValueError(f"row {row} has {count} tokens and cannot be cut to {length}")
        if 0 in pages[self._passed(length) : -(-length // self.page_size)]:
            raise ValueError(f"row {row} cannot be cut to {length} tokens: pages of the window before them are free")
        kept = -(-length // self.page_size)
        self._release(pages[kept:])
        del pages[kept:]
        self._counts[row] = length
        self._publish([row])

    def append(self, tokens: int | Sequence[int] = 1, rows: Sequence[int] | None = None) -> None:
        """Make room for the tokens that a model is about to store, at the end of each sequence.

        Args:
            tokens: for each of the rows, or for all.
            rows: all that have a sequence, unless given.

        Raises:
            CacheFullError: there are not enough pages, or a sequence would exceed `max_length`; no sequence changed.
        """
        rows = self.rows if rows is None else list(rows)
        counts = [tokens] * len(rows) if isinstance(tokens, int) else list(tokens)
        needed, writers = 0, Counter[int]()
        if passed := [row for row in rows if self._free_passed(row)]:
            self._publish(passed)
        for row, count in zip(rows, counts, strict=True):
            pages, length = self._pages_of(row), self._counts[row] + count
            if length > self.max_length:
                raise CacheFullError(
                    f"row {row} of the page table would have {length} tokens, more than its max_length of "
                    f"{self.max_length}; free the row, or make the table with a greater max_length"
                )
            needed += max(0, -(-length // self.page_size) - len(pages))
            if self._writes_shared(row, count):
                writers[pages[-1]] += 1
        # The last of those that share a page keeps it.
        needed += sum(min(count, self._users[page] - 1) for page, count in writers.items())
        if needed > len(self._free):
            raise CacheFullError(
                f"{sum(counts)} tokens of {len(rows)} sequences need {needed} more pages of {self.page_size}, "
                f"and {len(self._free)} of {self.pages} are free; free(row) a sequence, or make the table with more"
            )
        changed = []
        for row, count in zip(rows, counts, strict=True):
            pages = self._pages_of(row)
            before = list(pages)
            if self._writes_shared(row, count):
                page = self._take()
                for cache in self._caches:
                    cache.copy_page(pages[-1], page)
                self._release(pages[-1:])
                pages[-1] = page
            self._counts[row] += count
            while len(pages) * self.page_size < self._counts[row]:
                pages.append(self._take())
            if pages != before:
                changed.append(row)
        self._publish(changed)

    def _pages_of(self, row: int) -> list[int]:
        pages = self._pages[row] if 0 <= row < self.batch else None
        if pages is None:
            raise ValueError(f"row {row} of the page table has no sequence; those that do are {self.rows}")
        return pages

    def _passed(self, position: int) -> int:
        """Pages that lie wholly before what the token at a position attends to."""
        return max(0, position + 1 - self.window) // self.page_size if self.window else 0

    def _free_passed(self, row: int) -> bool:
        """Give back the pages that no further token of a sequence attends to; whether there were any."""
        pages = self._pages_of(row)
        passed = range(self._passed(self._counts[row]))
        dead = [page for page in pages[passed.start : passed.stop] if page]
        self._release(dead)
        pages[passed.start : passed.stop] = [0] * len(passed)
        return bool(dead)

    def _writes_shared(self, row: int, count: int) -> bool:
        """Whether new tokens would go into a page that other sequences have too."""
        pages = self._pages_of(row)
        return count > 0 and self._counts[row] % self.page_size > 0 and self._users[pages[-1]] > 1

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _release(self, pages: list[int]) -> None:
        for page in filter(None, pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)

    def _publish(self, rows: Sequence[int]) -> None:
        """Copy all lengths, and the pages of some rows, to the device."""
        self.lengths.copy_(torch.tensor(self._counts))
        if rows:
            most = self.block_table.shape[1]
            lines = [[*(self._pages[row] or ()), *[0] * most][:most] for row in rows]
            index = torch.tensor(rows, device=self.block_table.device)
            self.block_table.index_copy_(0, index, torch.tensor(lines, dtype=torch.int32, device=index.device))
