"""The recipe of the bundled video pipeline, a few steps of each stage: it gives a whole WanPipeline."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from ditkit.data.config import MotionConfig
from ditkit.data.emoji_motion import EmojiMotion, videos
from ditkit.training.tasks.latents import decode_video, encode_video
from ditkit.training.tasks.video_autoencoder import causal_convolution, decode_unclipped, frame_by_frame
from ditkit.training.trainer import train

OBJECTS = "objects: [red apple, banana], object_size: 20, travel: [8, 10]"
QUICK = [
    f"{stage}.{change}"
    for stage in ("pictures", "autoencoder", "decoder", "text_encoder", "frames", "transformer")
    for change in ("steps=2", "checkpoint_every=1", "sample_every=0", "heldout_every=0", "tracker=null")
] + [
    "pictures.batch_size=4", "pictures.task_options.measured_clips=2",
    f"pictures.data={{kind: emoji-motion, motion: {{{OBJECTS}, frames: 1}}}}",
    "autoencoder.batch_size=5", "autoencoder.task_options.measured_clips=2", "autoencoder.heldout_every=2",
    "autoencoder.sample_every=2", f"autoencoder.data={{kind: emoji-motion, motion: {{{OBJECTS}}}}}",
    "decoder.batch_size=5", "decoder.task_options.measured_clips=2",
    f"decoder.data={{kind: emoji-motion, motion: {{{OBJECTS}}}}}",
    f"text_encoder.data={{kind: emoji-motion, motion: {{{OBJECTS}}}}}", "text_encoder.batch_size=4",
    "text_encoder.task_options.components=8",
    f"frames.data={{kind: emoji-motion, motion: {{{OBJECTS}}}}}", "frames.batch_size=2",
    "frames.task_options.clips=2",
    f"transformer.data={{kind: emoji-motion, motion: {{{OBJECTS}}}}}", "transformer.batch_size=17",
    "transformer.task_options.clips=2", "transformer.sample_every=2",
    "transformer.task_options.preview_steps=2", "transformer.task_options.preview=[red apple moving left]",
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, request):
    output = tmp_path_factory.mktemp("micro") / "run"
    return train(request.config.rootpath / "configs" / "micro_wan.yaml", [f"output={output}", *QUICK])


def test_export_is_a_wan_pipeline(bundle):
    pipe = WanPipeline.from_pretrained(bundle, dtype=torch.float32)
    assert type(pipe) is WanPipeline
    assert (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial) == (2, 8)
    assert sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()) <= 15e6
    texts = [file.read_text(encoding="utf-8") for file in bundle.rglob("*.json")]
    assert not any(str(bundle.parent.parent) in text for text in texts)
    assert list((bundle.parent / "samples").glob("*.png"))


def test_the_transformer_sees_more_than_500_tokens(bundle):
    pipe = WanPipeline.from_pretrained(bundle, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    output = pipe("red apple moving left", height=64, width=64, num_frames=17, num_inference_steps=1,
                  guidance_scale=1.0, max_sequence_length=12, output_type="np").frames  # fmt: skip
    assert output.shape == (1, 17, 64, 64, 3)
    assert seen == [9 * 8 * 8]


def test_heldout_quality_of_the_autoencoder_is_recorded(bundle):
    lines = (bundle.parent.parent / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    recorded = {key for line in lines for key in json.loads(line)}
    assert {"heldout_psnr", "heldout_object_psnr"} <= recorded


def test_the_decoder_stage_leaves_the_latents_as_they_were(bundle):
    before, after = (
        AutoencoderKLWan.from_pretrained(bundle.parent.parent / stage / "export")
        for stage in ("autoencoder", "decoder")
    )
    video = EmojiMotion().clip(0).video[None]
    assert torch.equal(encode_video(before, video), encode_video(after, video))
    assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)


def test_latents_of_the_exported_autoencoder_are_standardised(bundle):
    autoencoder = AutoencoderKLWan.from_pretrained(bundle.parent.parent / "autoencoder" / "export")
    motion = MotionConfig(objects=["red apple", "banana"], object_size=20, travel=(8, 10))
    measured = EmojiMotion(motion, seed=1)
    latents = encode_video(autoencoder, videos([measured.clip(i) for i in range(2)]))
    channels = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(16), atol=1e-2, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.ones(16), atol=1e-2, rtol=0)
    restored = decode_video(autoencoder, latents)
    assert restored.shape == (2, 3, 17, 64, 64) and restored.abs().max() <= 1


def tiny_autoencoder():
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], patch_size=4,
        in_channels=48, out_channels=48, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def test_unclipped_decoding_and_flat_convolutions_are_the_models_own():
    autoencoder, latents = tiny_autoencoder(), torch.randn(2, 4, 3, 2, 2)
    with torch.no_grad():
        own = autoencoder.decode(latents).sample
        torch.testing.assert_close(decode_unclipped(autoencoder, latents).clamp(-1, 1), own)
        layer, picture = autoencoder.encoder.conv_in, torch.randn(2, 48, 1, 4, 4)
        torch.testing.assert_close(causal_convolution(layer, picture), layer(picture), atol=1e-5, rtol=1e-5)


def test_a_fresh_autoencoder_codes_frames_one_by_one():
    autoencoder = tiny_autoencoder()
    frame_by_frame(autoencoder)
    still = torch.randn(1, 3, 1, 16, 16).expand(-1, -1, 9, -1, -1)
    with torch.no_grad():
        latents = autoencoder.encode(still).latent_dist.mean
        video = decode_unclipped(autoencoder, latents)
    torch.testing.assert_close(latents, latents[:, :, :1].expand_as(latents), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(video, video[:, :, :1].expand_as(video), atol=1e-5, rtol=1e-5)
