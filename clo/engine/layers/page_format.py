"""How a layer keeps its pages, on the host and in slots: as computed, or coded. Knows nothing about where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clo.specs import PageCoding
from clo_kernels.coded_pages import CODE_DTYPE, coded_width, decode, encode


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Turns `[..., head_dim]` of the cache's dtype into what is kept, `[..., width]`, and back."""

    coding: PageCoding
    head_dim: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Elements that keep a key or value."""
        return self.head_dim if self.coding is PageCoding.NONE else coded_width(self.head_dim)

    @property
    def kept_dtype(self) -> torch.dtype:
        """Their type."""
        return self.dtype if self.coding is PageCoding.NONE else CODE_DTYPE

    def kept(self, values: torch.Tensor) -> torch.Tensor:
        """`values` as pages keep them."""
        return values if self.coding is PageCoding.NONE else encode(values)

    def restored(self, pages: torch.Tensor) -> torch.Tensor:
        """What attention takes `pages` for."""
        return pages if self.coding is PageCoding.NONE else decode(pages, self.dtype)
