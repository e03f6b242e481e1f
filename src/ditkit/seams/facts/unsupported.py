"""Classes of diffusers on which no method runs, and why: every transformer without facts, and every other
model that a pipeline may have in a transformer's place."""

from __future__ import annotations

_UNET_PART = "it is a part of U-Nets, between convolutions, not a denoiser of its own"
_UNET = "it is a U-Net: its blocks are joined across by skip connections, so that none can be left out"
_CONTROL = "it is a ControlNet: its blocks feed residuals to another transformer instead of an output"

UNSUPPORTED: dict[str, str] = {
    # diffusers.models.transformers
    "AnyFlowFARTransformer3DModel": (
        "it is autoregressive: it draws one chunk of frames after another, under a block-causal mask of flex "
        "attention and with a key-value cache of its own"
    ),
    "Cosmos3OmniTransformer": (
        "each block runs an understanding and a generating sequence together, without a batch dimension and "
        "with several kinds of tokens packed into them"
    ),
    "DreamLiteTransformer2DModel": _UNET_PART,
    "DualTransformer2DModel": _UNET_PART,
    "Kandinsky6SRTransformer3DModel": (
        "its self-attention is the model's own block-sparse flex attention, which has to be compiled and "
        "fails under the counting of FLOPs"
    ),
    "MiniMaxMusic3RVQDepthDecoder": "it is autoregressive: it predicts tokens one by one, without denoising",
    "PriorTransformer": "it is a prior: it denoises one embedding of a picture, not the tokens of one",
    "RFD4ProteinaTransformer": "it denoises proteins, chains of residues with a bias for each pair of them",
    "T5FilmDecoder": "it denoises spectrograms with T5's own attention, inside layers that return tuples",
    "Transformer2DModel": (
        f"{_UNET_PART}; released patched variants load as DiTTransformer2DModel or PixArtTransformer2DModel"
    ),
    "TransformerTemporalModel": _UNET_PART,
    "WanAnimate2Transformer3DModel": (
        "its attention is compiled flex attention over a key-value cache, which another forward of the same "
        "model fills"
    ),
    # Named like transformers, elsewhere in diffusers.
    "UTransformer2DModel": _UNET,
    "UniDiffuserModel": _UNET,
    "UVit2DModel": "it predicts masked discrete tokens with convolutions before and behind its blocks",
    # diffusers.models.controlnets
    "ControlNetModel": _CONTROL,
    "ControlNetUnionModel": _CONTROL,
    "ControlNetXSAdapter": _CONTROL,
    "CosmosControlNetModel": _CONTROL,
    "FluxControlNetModel": _CONTROL,
    "FluxMultiControlNetModel": _CONTROL,
    "HunyuanDiT2DControlNetModel": _CONTROL,
    "HunyuanDiT2DMultiControlNetModel": _CONTROL,
    "MultiControlNetModel": _CONTROL,
    "MultiControlNetUnionModel": _CONTROL,
    "QwenImageControlNetModel": _CONTROL,
    "QwenImageMultiControlNetModel": _CONTROL,
    "SD3ControlNetModel": _CONTROL,
    "SD3MultiControlNetModel": _CONTROL,
    "SanaControlNetModel": _CONTROL,
    "SparseControlNetModel": _CONTROL,
    "UNetControlNetXSModel": _CONTROL,
    "ZImageControlNetModel": _CONTROL,
    # diffusers.models.unets
    "UNet2DConditionModel": _UNET,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "Kandinsky3UNet": _UNET,
    "StableCascadeUNet": _UNET,
}
