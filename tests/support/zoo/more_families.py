"""More transformers families with batch norms, as small as their configurations allow.

transformers is imported when a model is built: the list itself needs nothing but torch.
"""

from typing import Any

from torch import nn

from support.zoo import Entry

_IMAGE = (3, 64, 64)
_RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
_HGNET = {
    **_RESNET,
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 24, 32],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 24, 32, 40],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
}
_VIT = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
}
_BEIT_SEGMENTATION = {**_VIT, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "num_labels": 5}
_HIERARCHICAL = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 2, 2],
    "decoder_hidden_size": 16,
}
_DETECTION = {
    "encoder_in_channels": [24, 32, 40],
    "encoder_hidden_dim": 32,
    "d_model": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_queries": 10,
    "decoder_in_channels": [32, 32, 32],
    "num_labels": 3,
}
_THREE_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
_SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_WAVEFORM = {
    **_SPEECH,
    "conv_dim": (8, 8, 8),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_SERIES = {
    "num_input_channels": 3,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 16,
    "prediction_length": 4,
}


def _build(model: str, config: str, **options: Any) -> nn.Module:
    """Return a model; an option `x={"class": …, …}` is a nested configuration."""
    import transformers

    nested = {
        name: getattr(transformers, value["class"])(
            **{key: option for key, option in value.items() if key != "class"}
        )
        if isinstance(value, dict) and "class" in value
        else value
        for name, value in options.items()
    }
    built = getattr(transformers, model)(getattr(transformers, config)(**nested))
    assert isinstance(built, nn.Module)
    return built


def _entry(
    name: str, model: str, config: str, shape: tuple[int, ...] = _IMAGE, **options: Any
) -> Entry:
    return Entry(f"transformers {name}", lambda: _build(model, config, **options), shape)


MORE_FAMILIES = (
    _entry(
        "EfficientNet", "EfficientNetForImageClassification", "EfficientNetConfig",
        image_size=64, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320,
    ),
    _entry(
        "MobileViT", "MobileViTForImageClassification", "MobileViTConfig",
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=2,
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
    ),
    _entry(
        "MobileViTV2", "MobileViTV2ForImageClassification", "MobileViTV2Config",
        image_size=64, width_multiplier=0.25,
    ),
    _entry(
        "SwiftFormer", "SwiftFormerForImageClassification", "SwiftFormerConfig",
        image_size=64, depths=[1, 1, 1, 1], embed_dims=[16, 16, 24, 32],
    ),
    _entry(
        "CvT", "CvtForImageClassification", "CvtConfig",
        embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3],
    ),
    _entry("SegFormer", "SegformerForSemanticSegmentation", "SegformerConfig", **_HIERARCHICAL),
    _entry("GLPN", "GLPNForDepthEstimation", "GLPNConfig", **_HIERARCHICAL),
    _entry("HGNetV2", "HGNetV2ForImageClassification", "HGNetV2Config", **_HGNET),
    _entry(
        "TextNet", "TextNetForImageClassification", "TextNetConfig",
        stem_out_channels=8, hidden_sizes=[8, 8, 16, 24, 32],
    ),
    _entry("PP-LCNet", "PPLCNetForImageClassification", "PPLCNetConfig", scale=0.25),
    _entry("BEiT", "BeitForSemanticSegmentation", "BeitConfig", **_BEIT_SEGMENTATION),
    _entry(
        "Data2Vec", "Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig",
        **_BEIT_SEGMENTATION,
    ),
    _entry(
        "UPerNet", "UperNetForSemanticSegmentation", "UperNetConfig",
        hidden_size=16, auxiliary_channels=16, auxiliary_in_channels=32, pool_scales=[1, 2],
        backbone_config={
            "class": "ResNetConfig", **_RESNET,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    ),
    _entry(
        "DPT", "DPTForSemanticSegmentation", "DPTConfig",
        **_VIT, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, use_batch_norm_in_fusion_residual=True, num_labels=5,
    ),
    _entry(
        "ZoeDepth", "ZoeDepthForDepthEstimation", "ZoeDepthConfig",
        backbone_config={
            "class": "BeitConfig", **_VIT, "reshape_hidden_states": False,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        backbone_hidden_size=16, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        bottleneck_features=16, num_relative_features=16, use_batch_norm_in_fusion_residual=True,
        patch_transformer_hidden_size=16, patch_transformer_intermediate_size=16,
        patch_transformer_num_attention_heads=2,
    ),
    _entry(
        "ViTMatte", "VitMatteForImageMatting", "VitMatteConfig", (4, 64, 64),
        hidden_size=16, fusion_hidden_sizes=[16, 12, 8, 8],
        backbone_config={
            "class": "VitDetConfig", "image_size": 64, "patch_size": 16, "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 4,
            "out_features": ["stage2"],
        },
    ),
    _entry(
        "ViTPose", "VitPoseForPoseEstimation", "VitPoseConfig",
        use_simple_decoder=False,
        backbone_config={
            "class": "VitPoseBackboneConfig", "image_size": [64, 64], "patch_size": [16, 16],
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "out_indices": [2],
        },
    ),
    _entry("RT-DETR backbone", "RTDetrResNetBackbone", "RTDetrResNetConfig", **_RESNET),
    _entry(
        "RT-DETR", "RTDetrForObjectDetection", "RTDetrConfig",
        backbone_config={"class": "RTDetrResNetConfig", **_RESNET, **_THREE_STAGES},
        **_DETECTION, decoder_layers=1, anchor_image_size=None,
    ),
    _entry(
        "D-FINE", "DFineForObjectDetection", "DFineConfig",
        backbone_config={"class": "HGNetV2Config", **_HGNET, **_THREE_STAGES},
        **_DETECTION, decoder_layers=2,
    ),
    _entry(
        "DETR", "DetrForObjectDetection", "DetrConfig",
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config={"class": "ResNetConfig", **_RESNET, "out_features": ["stage4"]},
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
    ),
    _entry(
        "Wav2Vec2-Conformer", "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", (1200,),
        **_WAVEFORM, conv_depthwise_kernel_size=7,
    ),
    _entry("HuBERT", "HubertModel", "HubertConfig", (1200,), **_WAVEFORM, conv_pos_batch_norm=True),
    _entry(
        "Parakeet", "ParakeetEncoder", "ParakeetEncoderConfig", (40, 16),
        **_SPEECH, subsampling_conv_channels=8, num_mel_bins=16,
    ),
    _entry(
        "PatchTST", "PatchTSTForPrediction", "PatchTSTConfig", (32, 3),
        **_SERIES, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, norm_type="batchnorm",
    ),
    _entry(
        "PatchTSMixer", "PatchTSMixerForPrediction", "PatchTSMixerConfig", (32, 3),
        **_SERIES, num_layers=2, norm_mlp="BatchNorm",
    ),
)  # fmt: skip
