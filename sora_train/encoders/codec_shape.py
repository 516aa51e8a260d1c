"""How latents relate to frames: all that planning needs to know of a codec."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CodecShape:
    """1 + n * temporal_ratio frames give 1 + n latent frames; a latent covers spatial_ratio x spatial_ratio pixels."""

    channels: int
    temporal_ratio: int
    spatial_ratio: int

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """C T H W of the latents of such a clip. Raises ValueError when the size does not fit the ratios."""
        if (num_frames - 1) % self.temporal_ratio or height % self.spatial_ratio or width % self.spatial_ratio:
            raise ValueError(
                f"{num_frames} frames of {height}x{width} do not fit the codec: it takes 1 + n*{self.temporal_ratio} "
                f"frames and multiples of {self.spatial_ratio} pixels"
            )
        ratio = self.spatial_ratio
        return self.channels, 1 + (num_frames - 1) // self.temporal_ratio, height // ratio, width // ratio
