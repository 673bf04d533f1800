"""The video transformers that we know, one entry each, and those that have nothing to make sparse."""

from __future__ import annotations

from dit_sparse.grid import Grid
from dit_sparse.pipelines import grids_video
from dit_sparse.pipelines.models import Model

VIDEO_MODELS: dict[str, Model] = {
    "WanTransformer3DModel": Model(
        r"blocks\.\d+\.attn1", grids_video.patched_video, "cross", "two forwards",
        ("81 frames of 480x832", Grid(21, 30, 52)),
    ),
    "HunyuanVideoTransformer3DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_video.patched_video, "suffix", "one",
        ("129 frames of 720x1280", Grid(33, 45, 80)), ("encoder_attention_mask",),
    ),
    "HunyuanVideo15Transformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn", grids_video.patched_video, "suffix", "two forwards",
        ("121 frames of 480x832", Grid(31, 30, 52)),
        ("encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"), "attention_mask",
    ),
    "CogVideoXTransformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_video.frames_first, "prefix", "doubled batch",
        ("49 frames of 480x720", Grid(13, 30, 45)),
    ),
    "ConsisIDTransformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_video.frames_first, "prefix", "doubled batch",
        ("49 frames of 480x720", Grid(13, 30, 45)),
    ),
    "WanVACETransformer3DModel": Model(
        r"(vace_)?blocks\.\d+\.attn1", grids_video.patched_video, "cross", "two forwards",
        ("81 frames of 480x832", Grid(21, 30, 52)),
        dense="nothing; reference images count as frames of the clip, for no argument tells how many there are",
    ),
    "WanAnimateTransformer3DModel": Model(
        r"blocks\.\d+\.attn1", grids_video.reference_frame, "cross", "two forwards",
        ("segments of 77 frames of 720x1280", Grid(20, 45, 80)),
    ),
    "SkyReelsV2Transformer3DModel": Model(
        r"blocks\.\d+\.attn1", grids_video.patched_video, "cross", "two forwards",
        ("97 frames of 544x960", Grid(25, 34, 60)),
        dense="calls with a block-causal mask (num_frame_per_block above 1)",
    ),
    "ChronoEditTransformer3DModel": Model(
        r"blocks\.\d+\.attn1", grids_video.patched_video, "cross", "two forwards",
        ("81 frames of 480x832", Grid(21, 30, 52)),
    ),
    "AnyFlowTransformer3DModel": Model(
        r"blocks\.\d+\.attn1", grids_video.frames_first, "cross", "doubled batch",
        ("81 frames of 480x832", Grid(21, 30, 52)),
    ),
    "HeliosTransformer3DModel": Model(
        r"blocks\.\d+\.attn1", grids_video.patched_video, "prefix", "two forwards",
        ("chunks of 33 frames of 384x640", Grid(9, 24, 40)),
        dense="all pairs with history tokens",
    ),
    "HunyuanVideoFramepackTransformer3DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_video.framepack, "suffix", "one",
        ("sections of 33 frames of 720x1280", Grid(9, 45, 80)), ("encoder_attention_mask",),
        dense="all pairs with history tokens",
    ),
    "MotifVideoTransformer3DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_video.patched_video, "suffix", "two forwards",
        ("121 frames of 736x1280", Grid(31, 46, 80)), ("encoder_attention_mask", "image_embeds"),
        dense="in decoder blocks all pairs with the encoder's copy of the video, three of four",
    ),
    "LTXVideoTransformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_video.ltx, "prefix", "doubled batch",
        ("161 frames of 512x704", Grid(21, 16, 22)),
        values=("video_coords",),
    ),
    "LTX2VideoTransformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_video.counted_video, "suffix", "doubled batch",
        ("121 frames of 512x768", Grid(16, 16, 24)),
        dense="masks between reference groups, audio, and pipelines that tell no sizes, unless you give grid=",
    ),
    "MochiTransformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_video.video_per_frame, "suffix", "doubled batch",
        ("19 frames of 480x848", Grid(4, 30, 53)),
    ),
    "AllegroTransformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_video.patched_video, "cross", "doubled batch",
        ("88 frames of 720x1280", Grid(22, 45, 80)), dense="masks of padded video",
    ),
    "EasyAnimateTransformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_video.video_per_frame, "prefix", "doubled batch",
        ("49 frames of 512x512", Grid(13, 32, 32)),
    ),
    "CosmosTransformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_video.patched_video, "cross", "two forwards",
        ("93 frames of 704x1280", Grid(24, 44, 80)),
    ),
    "Cosmos3OmniTransformer": Model(
        r"layers\.\d+\.self_attn", grids_video.cosmos3, "prefix", "two forwards",
        ("189 frames of 720x1280", Grid(48, 23, 40)),
        dense="the text's causal attention; several videos in one sequence; with sound or actions everything",
    ),
    "Kandinsky5Transformer3DModel": Model(
        r"visual_transformer_blocks\.\d+\.self_attention", grids_video.channels_last_video, "cross", "two forwards",
        ("121 frames of 512x768", Grid(31, 32, 48)), dense="everything while NABLA is on: it has its own block masks",
    ),
    "Kandinsky6Transformer3DModel": Model(
        r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention", grids_video.kandinsky6, "cross",
        "two forwards", ("121 frames of 512x768", Grid(31, 32, 48)), dense="audio",
    ),
    "MiniMaxH3Transformer3DModel": Model(
        r"transformer_blocks\.\d+\.attn", grids_video.minimax_h3, "prefix", "one",
        ("124 frames of 768x1344", Grid(37, 24, 42)), values=("position_ids",),
    ),
}  # fmt: skip

VIDEO_REFUSED: dict[str, str] = {
    "WanAnimate2Transformer3DModel": "every denoising step runs flex attention through a block mask that joins each "
    "generated frame to its own reference frame",
    "AnyFlowFARTransformer3DModel": "causal flex attention: block masks in training and prefill, and in a denoising "
    "step one chunk of three frames, padded to blocks of 128, most of whose keys are a cache of earlier chunks",
    "Kandinsky6SRTransformer3DModel": "its self-attention is NABLA, sparse by block masks of its own",
    "LatteTransformer3DModel": "attention within one frame or along one column of frames, over too few tokens",
    "SanaVideoTransformer3DModel": "its self-attention is linear",
    "SanaWMTransformer3DModel": "linear self-attention, and softmax layers without a processor to derive ours from",
    "SanaWMLTX2RefinerTransformer3DModel": "no argument of its forward tells the grid of a window; give it: "
    r"enable(transformer, spec, grid=..., layers=r'transformer_blocks\.\d+\.attn1')",
}
