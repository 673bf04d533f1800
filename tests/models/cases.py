"""All tiny models, family by family."""

from __future__ import annotations

from tests.models import (
    image_flux,
    image_packed,
    image_rows,
    image_sized,
    video_cosmos,
    video_history,
    video_hunyuan,
    video_kandinsky,
    video_ltx,
    video_wan,
)
from tests.models.case import Case

FAMILIES = (
    video_wan, video_hunyuan, video_history, video_ltx, video_cosmos, video_kandinsky,
    image_flux, image_sized, image_rows, image_packed,
)  # fmt: skip
CASES: list[Case] = [case for family in FAMILIES for case in family.CASES]
