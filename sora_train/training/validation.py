"""What is looked at during training, with the averaged weights: the loss on held-out clips, and sampled videos.

Held-out clips keep their noise and timesteps for the whole run, so that the curve moves only when the model does.
A second model of plain weights is filled from the average for it, a parameter at a time: one whole copy on each rank,
in the precision of training, whatever the ZeRO stage.
"""

from pathlib import Path
from typing import Any

import torch

from sora_train.config.model import ModelConfig
from sora_train.config.root import TrainConfig
from sora_train.data.loader import Loader
from sora_train.data.video_file import save_video
from sora_train.distributed.collectives import gather_facts, sum_over_ranks
from sora_train.distributed.parallelize import compute_dtype, parallelize
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import World
from sora_train.generation import Request, generate
from sora_train.models.video_dit import VideoDiT
from sora_train.training.ema import Ema
from sora_train.training.step import Encoders, diffusion_loss
from sora_train.training.tracking import Tracker


class Validation:
    """Held-out loss and samples at chosen steps."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        loader: Loader,
        encoders: Encoders,
        shapes: dict[str, Any],
        groups: SequenceGroups,
    ) -> None:
        """`shapes` of the trained parameters, the same on all ranks."""
        self.config, self.world, self.loader, self.encoders, self.shapes = config, world, loader, encoders, shapes
        self.groups = groups
        self.requests = validation_requests(config)

    @torch.no_grad()
    def run(self, ema: Ema, tracker: Tracker, step: int) -> None:
        """After `step` steps. Every rank must call it."""
        # In the precision of training: the kernels that `parallelize` chooses are for it.
        model = build_empty(self.config.model, self.world.device, compute_dtype(self.config.parallel)).eval()
        parameters = dict(model.named_parameters())
        for name, whole in ema.each_whole(self.shapes):
            parameters[name].copy_(whole)
        parallelize(model, self.config.parallel, self.world, self.groups, is_quiet=True)
        values = self._held_out_loss(model)
        folder = Path(self.config.run_dir) / "samples" / f"step-{step:08d}"
        videos = {prompt: path for part in gather_facts(self._sample(model, folder)) for prompt, path in part.items()}
        tracker.log_validation(step, values, videos)

    def _held_out_loss(self, model: VideoDiT) -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for pack in self.loader.validation_packs(self.config.validation.clips):
            pack = pack.to(self.world.device)
            config = self.config
            result = diffusion_loss(model, pack, self.encoders, config.model, config.diffusion, self.groups)
            weight_S = result.weight_S.double()
            sums += torch.stack([(result.sample_loss_S.double() * weight_S).sum(), weight_S.sum()])
        loss, clips = sum_over_ranks(sums).tolist()
        return {"held_out_loss": loss / clips} if clips else {}

    def _sample(self, model: VideoDiT, folder: Path) -> dict[str, Path]:
        """Each rank generates a share of the prompts."""
        mine = self.requests[self.world.global_rank :: self.world.world_size]
        videos = generate(
            model,
            self.encoders.codec,
            mine,
            self.config.sampling,
            self.config.diffusion,
            encode_text=self.encoders.encode_text,
            max_tokens_per_pack=self.config.data.max_tokens_per_pack,
        )
        paths = {}
        for request, frames in zip(mine, videos, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{self.requests.index(request):02d}.mp4"
            save_video(frames, path, self.config.validation.fps)
            paths[request.prompt] = path
        return paths


def validation_requests(config: TrainConfig) -> list[Request]:
    """The samples of each validation, each prompt once."""
    size = config.validation
    return [
        Request(prompt, size.height, size.width, size.frames, config.seed) for prompt in dict.fromkeys(size.prompts)
    ]


def build_empty(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> VideoDiT:
    """A model whose parameters are to be filled; nowhere is there one of greater precision beside it."""
    with torch.device("meta"):
        model = VideoDiT(config)
    return model.to(dtype).to_empty(device=device)
