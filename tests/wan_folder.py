"""Tiny Wan pipelines as diffusers lays them out, with random weights; and shards of a few clips to train them on."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.data.index_writer import write_index
from sora_train.data.video_file import save_video
from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_weights import save_wan

TEXT_WIDTH = 12
CLIP_SIDE = 32
VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 3.0, 4.0],
}
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "square", "moves", "left"]


def tiny_model(**fields: Any) -> ModelConfig:
    text = TextConfig(kind=TextKind.encoder, width=TEXT_WIDTH)
    sizes = {"width": 24, "depth": 2, "heads": 2, "mlp_width": 32, "in_channels": 4, "out_channels": 4}
    return ModelConfig(name="wan", text=text, **{**sizes, **fields})


def settings_of(config: ModelConfig) -> list[str]:
    """Arguments that make a run's model this one."""
    names = ("width", "depth", "heads", "mlp_width", "in_channels", "out_channels", "condition_channels", "image_width")
    return [*(f"model.{name}={getattr(config, name)}" for name in names), f"model.text.width={config.text.width}"]


def random_model(config: ModelConfig, seed: int) -> VideoDiT:
    """No weight is zero or like another."""
    model = VideoDiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def save_pipeline(
    folder: Path, config: ModelConfig | None = None, boundary: float | None = None, takes_frames: bool = False
) -> Path:
    """transformer/ (and transformer_2/, with `boundary`), vae/, text_encoder/, tokenizer/ and model_index.json; with
    image_encoder/ and image_processor/ where the model attends to images."""
    import diffusers
    import transformers

    config = config or tiny_model()
    index = {"_class_name": "WanPipeline", "boundary_ratio": boundary, "expand_timesteps": takes_frames}
    save_wan(random_model(config, 0), folder / "transformer", max_shard_bytes=20_000)
    if boundary is not None:
        save_wan(random_model(config, 1), folder / "transformer_2")
    (folder / "model_index.json").write_text(json.dumps(index))
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(**VAE).save_pretrained(folder / "vae")
    umt5 = transformers.UMT5Config(vocab_size=16, d_model=TEXT_WIDTH, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    transformers.UMT5EncoderModel(umt5).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    if config.image_width:
        clip = transformers.CLIPVisionConfig(
            hidden_size=config.image_width, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            image_size=CLIP_SIDE, patch_size=CLIP_SIDE // 2,
        )  # fmt: skip
        transformers.CLIPVisionModel(clip).save_pretrained(folder / "image_encoder")
        prepare: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.25]}
        prepare |= {"image_processor_type": "CLIPImageProcessor"}
        prepare |= {"size": {"shortest_edge": CLIP_SIDE}, "crop_size": {"height": CLIP_SIDE, "width": CLIP_SIDE}}
        (folder / "image_processor").mkdir()
        (folder / "image_processor" / "preprocessor_config.json").write_text(json.dumps(prepare))
    return folder


def save_tokenizer(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_shards(folder: Path) -> Path:
    """Eight clips of 5 to 9 frames and an image, with a caption each."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for number in range(8):
            frames = np.full((1 if number == 3 else 5 + number % 3 * 2, 64, 64 + 16 * (number % 2), 3), 60, np.uint8)
            for i, frame in enumerate(frames):
                frame[16:32, 4 * i + number : 4 * i + number + 12] = (250, 20, 60)
            path = folder.parent / "clip.mp4"
            save_video(frames, path, 16.0)
            for name, data in ((f"{number:03d}.mp4", path.read_bytes()), (f"{number:03d}.txt", b"a red square moves")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    write_index(folder)
    return folder
