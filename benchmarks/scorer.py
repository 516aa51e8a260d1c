"""May the scorer judge samples? Its readings against the truth of H.264-coded clips of level `simple`.

    python benchmarks/scorer.py --json benchmarks/results/scorer.json

Each clip is rendered, coded as data_pipelines.world codes it, decoded and read; a second pass spoils the decoded
frames as a young model's samples are spoilt: blurred, tinted, noisy. Both are held to 0.99 for every attribute.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from data_pipelines.world import encode_mp4
from sora_train.config.world import Level
from sora_train.world.render import render
from sora_train.world.sampling import sample_scene
from sora_train.world.scene import truth
from sora_train.world.score import Reading, score_clip, share_correct

BAR = 0.99
Frames = NDArray[np.uint8]


def coded_clip(seed: int, index: int) -> tuple[Frames, Reading]:
    """A simple clip after coding and decoding, [T, H, W, 3], and what it shows."""
    scene = sample_scene(seed, index, Level.simple)
    (item,) = truth(scene)["objects"]
    with av.open(io.BytesIO(encode_mp4(render(scene), scene.fps)), "r") as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.uint8)
    return frames, Reading(item["color"], item["shape"], item["motion"])


def spoil(frames: Frames, rng: np.random.Generator) -> Frames:
    """Blurred over five pixels, tinted by up to 15 per cent a channel, with noise of standard deviation 12."""
    soft: NDArray[Any] = frames.astype(np.float32)
    for axis in (1, 2):
        for _ in range(2):
            edge = [(0, 0)] * 4
            edge[axis] = (1, 1)
            padded = np.pad(soft, edge, mode="edge")
            size = soft.shape[axis]
            soft = np.mean([np.take(padded, range(shift, shift + size), axis=axis) for shift in range(3)], axis=0)
    soft = soft * rng.uniform(0.85, 1.15, 3) + rng.normal(0, 12, soft.shape)
    return np.clip(soft, 0, 255).astype(np.uint8)


def measure(num_clips: int, seed: int) -> list[dict[str, Any]]:
    """The rows of the result file."""
    clips = [coded_clip(seed, index) for index in range(num_clips)]
    expected = [wanted for _, wanted in clips]
    start = time.perf_counter()
    as_coded = [score_clip(frames) for frames, _ in clips]
    rate = num_clips / (time.perf_counter() - start)
    rng = np.random.default_rng([seed, 4])
    spoilt = [score_clip(spoil(frames, rng)) for frames, _ in clips]

    conditions = f"{num_clips} H.264-coded simple clips, seed {seed}"
    rows: list[dict[str, Any]] = []
    for readings, where in ((as_coded, conditions), (spoilt, f"{conditions}; blurred, tinted, noisy")):
        for name, share in share_correct(readings, expected).items():
            rows.append(
                {
                    "name": f"scorer reads {name}",
                    "value": share,
                    "unit": "share of clips",
                    "bar": BAR,
                    "holds": share >= BAR,
                    "conditions": where,
                }
            )
    rows.append(
        {"name": "scorer speed", "value": rate, "unit": "clips/s", "bar": None, "holds": True, "conditions": conditions}
    )
    return rows


def main() -> None:
    """Prints the rows; leaves with 1 when one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    rows = measure(arguments.clips, arguments.seed)
    for row in rows:
        print(f"{row['name']:22} {row['value']:8.4f} {row['unit']:15} {row['conditions']}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    raise SystemExit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    main()
