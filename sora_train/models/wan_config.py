"""What diffusers calls things: the fields of WanTransformer3DModel's config.json, and the names of its tensors.

Pure; `wan_weights` reads and writes the files. Both directions of both mappings stand side by side here.
"""

from typing import Any

import torch

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.root import ConfigError
from sora_train.models.inputs import patch_of
from sora_train.models.video_dit import VideoDiT

CLASS_NAME = "WanTransformer3DModel"
QK_NORM = "rms_norm_across_heads"
ROPE_THETA = 10000.0  # fixed in diffusers
# Beginnings and middles of names, ours and theirs.
BEGINNINGS = {
    "time_embedding.linear_1.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.linear_2.": "condition_embedder.time_embedder.linear_2.",
    "time_embedding.project.": "condition_embedder.time_proj.",
    "text_projection.": "condition_embedder.text_embedder.",
    "image_projection.positions": "condition_embedder.image_embedder.pos_embed",
    "image_projection.norm": "condition_embedder.image_embedder.norm",
    "image_projection.linear_1.": "condition_embedder.image_embedder.ff.net.0.proj.",
    "image_projection.linear_2.": "condition_embedder.image_embedder.ff.net.2.",
}
MIDDLES = {".to_out.": ".to_out.0.", ".ffn.up.": ".ffn.net.0.proj.", ".ffn.down.": ".ffn.net.2."}
# Of early conversions, without use in the model; diffusers skips it as well.
UNUSED = "norm_added_q"


def their_name(name: str) -> str:
    """diffusers' name of one of our parameters."""
    for ours, theirs in BEGINNINGS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for ours, theirs in MIDDLES.items():
        name = name.replace(ours, theirs)
    return name


def their_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of diffusers' tensors by our names: ours, but for the patch embedding, which is a Conv3d there.

    Flattened they hold the same numbers in the same order, so a piece of one is that piece of the other.
    """
    with torch.device("meta"):
        model = VideoDiT(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    channels = config.in_channels + config.condition_channels
    shapes["patch_embedding.weight"] = (config.width, channels, *patch_of(config))
    return shapes


def from_diffusers(values: dict[str, Any], where: str) -> ModelConfig:
    """ModelConfig of a config.json.

    Args:
        values: the file's content.
        where: named in errors.

    Raises:
        ConfigError: not a WanTransformer3DModel, or one with a field that is not known here or has a value that
            VideoDiT has not.
    """
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    name = values.get("_class_name")
    if name != CLASS_NAME:
        raise ConfigError(f"{where} is of a {name}: give the folder of a {CLASS_NAME} as diffusers saves it")
    fields = dict(DEFAULTS)
    unknown = sorted(given.keys() - fields.keys())
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]}={given[unknown[0]]} is not known here: give a plain {CLASS_NAME}")
    for key, value in given.items():
        _check_type(key, value, where)
    fields |= given
    width = fields["num_attention_heads"] * fields["attention_head_dim"]
    latent_channels = fields["out_channels"] or fields["in_channels"]
    if fields["qk_norm"] != QK_NORM:
        raise ConfigError(f"{where}: qk_norm={fields['qk_norm']} is not known here, Wan has {QK_NORM}")
    if fields["in_channels"] < latent_channels:
        raise ConfigError(f"{where}: in_channels={fields['in_channels']} is below out_channels={latent_channels}")
    if (fields["image_dim"] is None) != (fields["added_kv_proj_dim"] is None) or (
        fields["added_kv_proj_dim"] not in (None, width)
    ):
        raise ConfigError(
            f"{where}: added_kv_proj_dim={fields['added_kv_proj_dim']} with image_dim={fields['image_dim']} is not "
            f"Wan's: both are null, or the first is the width, {width}"
        )
    patch_frames, patch_height, patch_width = fields["patch_size"]
    return ModelConfig(
        name="wan",
        width=width,
        depth=fields["num_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["ffn_dim"],
        in_channels=latent_channels,
        out_channels=latent_channels,
        condition_channels=fields["in_channels"] - latent_channels,
        image_width=fields["image_dim"] or 0,
        image_positions=(fields["pos_embed_seq_len"] or 0) if fields["image_dim"] else 0,
        patch_frames=patch_frames,
        patch_height=patch_height,
        patch_width=patch_width,
        frequency_width=fields["freq_dim"],
        cross_attention_norm=fields["cross_attn_norm"],
        eps=fields["eps"],
        text=TextConfig(kind=TextKind.encoder, width=fields["text_dim"]),
    )


def _check_type(key: str, value: Any, where: str) -> None:
    default = DEFAULTS[key]
    if isinstance(default, list):
        fits = isinstance(value, list) and len(value) == 3 and all(type(each) is int and each > 0 for each in value)
    elif default is None or key == "out_channels":
        fits = value is None or (type(value) is int and value > 0)
    elif type(default) is int:
        fits = type(value) is int and value > 0
    else:
        fits = type(value) is type(default) or (value is None and key == "qk_norm")
    if not fits:
        raise ConfigError(f"{where}: {key}={value!r} is not of the kind of {default!r}: download it again")


# diffusers' own, for fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": QK_NORM,
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}


def to_diffusers(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
        ConfigError: the model has something that diffusers' class has not.
    """
    wanted = {
        "text.kind": (config.text.kind, TextKind.encoder),
        "qk_norm": (config.qk_norm, True),
        "rope_theta": (config.rope_theta, ROPE_THETA),
        "out_channels": (config.out_channels, config.in_channels),
    }
    for field, (value, needed) in wanted.items():
        if value != needed:
            value, needed = (getattr(each, "value", each) for each in (value, needed))
            raise ConfigError(
                f"model.{field}={value}: diffusers' {CLASS_NAME} knows only {needed}, it cannot be saved so"
            )
    has_image = config.image_width > 0
    return {
        "_class_name": CLASS_NAME,
        **DEFAULTS,
        "patch_size": list(patch_of(config)),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels + config.condition_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text.width,
        "freq_dim": config.frequency_width,
        "ffn_dim": config.mlp_width,
        "num_layers": config.depth,
        "cross_attn_norm": config.cross_attention_norm,
        "eps": config.eps,
        "image_dim": config.image_width if has_image else None,
        "added_kv_proj_dim": config.width if has_image else None,
        "pos_embed_seq_len": config.image_positions or None,
    }
