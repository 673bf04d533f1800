"""The procedural clips: same numbers, same clip; captions and vocabulary agree; pixels show what captions say."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from dit_sparse.assets.train.clips import CAPTION_TOKENS, Scene, caption_ids, captions, scene
from dit_sparse.assets.train.parts import new_tokenizer
from dit_sparse.assets.train.render import render
from dit_sparse.assets.train.words import BACKGROUNDS, COLOURS, PAD, UNKNOWN, vocabulary


def _rows(clips: Scene, start: int, stop: int) -> dict[str, torch.Tensor]:
    return {field.name: getattr(clips, field.name)[start:stop] for field in fields(clips)}


def test_a_clip_does_not_depend_on_its_batch() -> None:
    whole = scene(7, torch.arange(40, 52))
    for start, stop in ((0, 1), (1, 5), (5, 12)):  # a single clip, and two uneven parts
        part = scene(7, torch.arange(40 + start, 40 + stop))
        for name, value in _rows(whole, start, stop).items():
            assert torch.equal(value, getattr(part, name)), name
        assert captions(part) == captions(whole)[start:stop]
    pixels = render(scene(7, torch.arange(6)), 5, 16, 24)
    torch.testing.assert_close(render(scene(7, torch.arange(4, 6)), 5, 16, 24), pixels[4:], rtol=0, atol=1e-5)


def test_seed_and_index_both_matter() -> None:
    first = captions(scene(1, torch.arange(64)))
    assert first != captions(scene(2, torch.arange(64)))
    assert len(set(first)) > 60
    assert first != captions(scene(1, torch.arange(64) + (1 << 32)))


def test_a_clip_is_the_same_at_every_size() -> None:
    clips = scene(3, torch.arange(4))
    small = render(clips, 9, 32, 32)
    shrunk = torch.nn.functional.avg_pool3d(render(clips, 9, 128, 128), (1, 4, 4))
    assert (small - shrunk).abs().mean() < 0.03


def test_captions_spell_their_token_ids() -> None:
    clips = scene(11, torch.arange(3000))
    ids, texts = caption_ids(clips), captions(clips)
    encoded = new_tokenizer()(texts, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
    assert torch.equal(encoded.input_ids, ids)
    assert torch.equal(encoded.attention_mask > 0, ids > 0)
    assert (ids[:, -1] == 0).all(), "a caption fills CAPTION_TOKENS: it may have been cut"
    seen = set(ids.unique().tolist())
    assert seen == set(vocabulary().values()) - {vocabulary()[UNKNOWN]}, "a word that no caption uses is never trained"
    assert vocabulary()[PAD] == 0


def test_pixels_have_the_colours_of_the_caption() -> None:
    clips = scene(5, torch.arange(400))
    calm = ~(clips.light | clips.bar)
    plain = (clips.background == list(BACKGROUNDS).index("plain")) & calm
    pixels = (render(clips, 1, 16, 16)[:, :, 0] + 1) / 2
    palette = torch.tensor(list(COLOURS.values()))
    background = palette[clips.background_colours[:, 0]][:, :, None, None]
    share = ((pixels - background).abs().amax(dim=1) < 0.02).float().mean(dim=(1, 2))
    assert plain.sum() > 30
    assert (share[plain] > 0.2).all()
    assert share[plain].mean() > 0.6
    assert (clips.colour[:, 0] != clips.background_colours[:, 0]).all()


@pytest.mark.parametrize("frames", [1, 33, 40])  # one frame, a training clip, longer than one
def test_pixels_stay_in_range(frames: int) -> None:
    pixels = render(scene(9, torch.arange(8)), frames, 16, 32)
    assert pixels.shape == (8, 3, frames, 16, 32)
    assert pixels.isfinite().all()
    assert pixels.abs().max() <= 1
