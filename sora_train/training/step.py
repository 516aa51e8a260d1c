"""One micro-step: a pack in, this rank's share of the step's loss out.

    latents    codec of the frames (or cached)                       C T H W each
    noisy      (1 - t) latents + t noise                             L P
    prediction the model, called through the engine                  L Q
    loss       sum of weighted squared errors / planned global count scalar
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_train.config.diffusion import CountedBy, DiffusionConfig
from sora_train.config.model import ModelConfig, TextKind
from sora_train.data.loader import Pack
from sora_train.encoders.video_codec import VideoCodec, to_unit_range
from sora_train.models.attention import PackLayout
from sora_train.models.patchify import patchify, positions
from sora_train.training.metrics import PackLoss
