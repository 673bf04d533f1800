"""What a pattern chooses on one grid, and a picture of it: static patterns as they are, others on a made-up input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BlockIndices
from dit_sparse.patterns import Pattern, PatternState, StaticPattern
from dit_sparse.runner import exact_attention
from dit_sparse.search.staging import check_writable, staged
from dit_sparse.selection import Selection

MOST_MADE_UP_TOKENS = 16_384  # some scores look at all pairs of tokens
MADE_UP_HEADS, HEAD_DIM = 2, 64
PICTURE_PIXELS, GAP_PIXELS, MOST_PANELS = 512, 8, 4
# Shades of a block: read by nobody, skipped but stood for by its means, read in part, read whole.
PALETTE = {"gap": 255, "empty": 240, "stood for": 205, "partial": 140, "full": 20}


@dataclass(frozen=True, eq=False)
class Look:
    """Hold what a pattern chose on a grid, for each head."""

    selection: Selection
    heads: int
    pairs: float  # query-key pairs of video tokens in one head

    @property
    def density(self) -> float:
        return float(self.selection.kept_pairs.sum()) / (self.pairs * self.heads)

    @property
    def computed_density(self) -> float:
        return float(self.selection.visited_pairs.sum()) / (self.pairs * self.heads)


def look_at(pattern: Pattern, grid: Grid) -> Look:
    """Let a pattern choose on a grid: a static one for every kind of head, another one on `made_up` q and k.

    A pattern that takes turns over the layers is asked for layer 0.

    Raises: ValueError where it does not fit the grid, or needs content on a grid too large for that.
    """
    pattern = pattern.at_layer(0)
    pattern.check(grid)
    layout = pattern.token_order().layout(grid, "cpu")
    if isinstance(pattern, StaticPattern):
        heads = len(pattern.variants(grid))
        q = k = v = torch.zeros(1, 1, 1, 1).expand(1, grid.tokens, heads, 1)  # a static pattern reads their shape
    else:
        if grid.tokens > MOST_MADE_UP_TOKENS:
            raise ValueError(
                f"{pattern.name} chooses by content, which is made up for at most {MOST_MADE_UP_TOKENS:,} tokens; "
                f"the grid {grid} has {grid.tokens:,}"
            )
        heads = MADE_UP_HEADS
        q, k, v = (layout.to_kernel(x) for x in made_up(grid))
    scale = HEAD_DIM**-0.5
    exact = exact_attention(k, v, layout, scale, None, "cpu", {})
    selection = pattern.select(q, k, grid, PatternState(layout, scale, step=0, v=v, exact=exact))
    return Look(selection, heads, float(grid.video_tokens) ** 2)


def made_up(grid: Grid, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [1, S, 2, 64] in the grid's order whose attention is local, with some places that all look at.

    The logit of a pair of video tokens is 8 exp(-d²/2), of their distance d in fractions of the grid, plus up to 6
    for keys near three drawn places, plus noise of about a half. Head 0 sees 8 % of each axis around it, head 1 the
    same in height and width but a half of the frames. Text has the noise alone. The local part is made of random
    waves (their mean product is the Gaussian), the part that all look at of one dimension.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    waves = (HEAD_DIM - 16) // 2
    axes = torch.meshgrid(*(torch.arange(n) / n for n in grid.shape), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2)  # [N, 3] in [0, 1)
    reach = torch.tensor([[0.08, 0.08, 0.08], [0.5, 0.08, 0.08]])  # [head, axis]
    phase = torch.einsum("nd,hdw->nhw", place, draw(MADE_UP_HEADS, 3, waves) / reach[..., None])
    local = torch.cat([phase.cos(), phase.sin()], -1) / math.sqrt(waves)
    drawn = torch.rand(3, 3, generator=generator)
    liked = (-(place[:, None] - drawn).square().sum(-1) / (2 * 0.08**2)).exp().amax(1)  # [N]
    q, k = draw(grid.tokens, MADE_UP_HEADS, HEAD_DIM), draw(grid.tokens, MADE_UP_HEADS, HEAD_DIM)
    video = slice(grid.prefix, grid.prefix + grid.video_tokens)
    root = math.sqrt(8 * math.sqrt(HEAD_DIM))
    q[video, :, : 2 * waves] = k[video, :, : 2 * waves] = root * local
    q[:, :, 2 * waves], k[:, :, 2 * waves] = math.sqrt(HEAD_DIM), 0
    k[video, :, 2 * waves] = 6 * liked[:, None]
    return q[None], k[None], draw(1, grid.tokens, MADE_UP_HEADS, HEAD_DIM)


def draw(pattern: Pattern, grid: Grid, path: Path) -> None:
    """Draw the blocks of at most four kinds of head side by side, in kernel order with the text blocks last.

    A row is a query block, a column a key block: dark where it is read whole, grey in part, light grey where its
    means stand for it, lightest where it is left out. Heads with a token order of their own are drawn in that order.

    Raises: ValueError where the pattern does not fit the grid, or the file cannot be written.
    """
    check_writable(path.parent)
    look = look_at(pattern, grid)
    indices = look.selection.indices
    shades = block_shades(indices, look.selection.compensate)
    rows = indices.head_of.unique()[:MOST_PANELS] if isinstance(pattern, StaticPattern) else indices.head_of
    panels = [enlarged(shades[row]) for row in rows.tolist()]
    gap = torch.full((panels[0].shape[0], GAP_PIXELS), PALETTE["gap"])
    pixels = torch.cat([part for panel in panels for part in (gap, panel)][1:], 1)
    picture = Image.fromarray(pixels.to(torch.uint8).numpy()).quantize(len(PALETTE))
    with staged(path.parent) as folder:
        picture.save(folder / path.name, format="PNG", optimize=True)


def block_shades(indices: BlockIndices, compensate: bool) -> Tensor:
    """Return the shade of PALETTE of each block, int64 [U, Q, K]."""
    skipped = PALETTE["stood for"] if compensate else PALETTE["empty"]
    shades = torch.where(indices.block_mask(), PALETTE["full"], skipped)
    shades[indices.partial_mask()] = PALETTE["partial"]
    return shades


def enlarged(shades: Tensor) -> Tensor:
    """Enlarge shades [Q, K] by the whole number that brings them nearest below PICTURE_PIXELS, at least 1."""
    scale = max(1, PICTURE_PIXELS // max(shades.shape))
    return shades.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
