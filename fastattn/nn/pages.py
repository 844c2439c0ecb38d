"""Which page of a paged cache belongs to which sequence: bookkeeping on the host, without any keys."""

from __future__ import annotations


class PageTable:
    """Hands out pages to sequences. A page may belong to several of them, until one wants to write to it.

    batch       number of sequences
    max_pages   most pages of one sequence
    num_pages   pages that there are
    page_size   keys per page
    """

    def __init__(self, batch: int, max_pages: int, num_pages: int, page_size: int) -> None:
        self.page_size, self.max_pages, self.num_pages = page_size, max_pages, num_pages
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self.users = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))  # taken from the end: page 0 first

    def reserve(self, lengths: list[int], new: int) -> tuple[PageTable, list[tuple[int, int]]]:
        """A table in which every sequence has pages of its own for `new` keys behind its `lengths`.

        This table stays as it is; it is returned itself if it is one already. The list holds (from, to): pages
        whose content has to be copied, because others read the one written to.
        Raises ValueError if there are too few pages.
        """
        needed = self._missing(lengths, new)
        if needed > len(self.free):
            raise ValueError(
                f"the cache has no room for {new} more keys per sequence: that needs {needed} more pages of "
                f"{self.page_size} keys, and {len(self.free)} of its {self.num_pages} are free"
            )
        if needed == 0:
            return self, []
        table = self._copy()
        return table, table._take_for(lengths, new)

    def keep(self, b: int, length: int) -> None:
        """Frees sequence b's pages behind its first `length` keys."""
        pages = self.pages[b]
        while len(pages) > self._count(length):
            self._release(pages.pop())

    def reorder(self, indices: list[int]) -> None:
        """Sequence b continues with the pages of what was sequence indices[b]."""
        old, self.pages = self.pages, [list(self.pages[i]) for i in indices]
        for pages in self.pages:
            for page in pages:
                self.users[page] += 1
        for pages in old:
            for page in pages:
                self._release(page)

    def rows(self) -> list[list[int]]:
        """The block table: (batch, max_pages), 0 where a sequence has no page."""
        return [pages + [0] * (self.max_pages - len(pages)) for pages in self.pages]

    def _copy(self) -> PageTable:
        table = PageTable(0, self.max_pages, 0, self.page_size)
        table.num_pages, table.pages = self.num_pages, [list(pages) for pages in self.pages]
        table.users, table.free = list(self.users), list(self.free)
        return table

    def _take_for(self, lengths: list[int], new: int) -> list[tuple[int, int]]:
        copies = []
        for b, length in enumerate(lengths):
            pages = self.pages[b]
            for slot in range(length // self.page_size, self._count(length + new)):
                if slot == len(pages):
                    pages.append(self._take())
                elif self.users[pages[slot]] > 1:
                    copies.append((pages[slot], self._take()))
                    self._release(pages[slot])
                    pages[slot] = copies[-1][1]
        return copies

    def _count(self, keys: int) -> int:
        return -(-keys // self.page_size)

    def _missing(self, lengths: list[int], new: int) -> int:
        users, missing = self.users.copy(), 0
        for pages, length in zip(self.pages, lengths, strict=True):
            for slot in range(length // self.page_size, self._count(length + new)):
                shared = slot < len(pages) and users[pages[slot]] > 1
                missing += shared or slot >= len(pages)
                if shared:
                    users[pages[slot]] -= 1  # the last one to write keeps the page
        return missing

    def _take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def _release(self, page: int) -> None:
        self.users[page] -= 1
        if self.users[page] == 0:
            self.free.append(page)
