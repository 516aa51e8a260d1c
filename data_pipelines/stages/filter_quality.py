"""Fourth stage: scores of a clip, and bounds on them. The scores stay in the record, for later choices."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipelines.record import Record, View
from data_pipelines.stages.stage import Filter
from sora_train.config.curation import FilterConfig

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601


def quality_scores(view: View) -> dict[str, float]:
    """Scores of a view, all on the scale 0 to 255.

    Of luma: `motion`, mean absolute change between neighbouring frames; `brightness`, mean; `sharpness`, mean absolute
    difference of neighbouring pixels. Of the color channel that varies most: `contrast`, standard deviation within a
    frame, the mean over frames; luma alone would call a red figure on a gray of its brightness blank.
    """
    luma = view.frames.astype(np.float32) @ LUMA
    motion = float(np.abs(np.diff(luma, axis=0)).mean()) if len(luma) > 1 else 0.0
    edges = [np.abs(np.diff(luma, axis=axis)).mean() for axis in (1, 2) if luma.shape[axis] > 1]
    return {
        "motion": round(motion, 3),
        "brightness": round(float(luma.mean()), 3),
        "contrast": round(float(view.frames.std(axis=(1, 2), dtype=np.float32).mean(axis=0).max()), 3),
        "sharpness": round(float(np.mean(edges)) if edges else 0.0, 3),
    }


class FilterQuality(Filter):
    """Rejects clips that are too small, too short, too elongated, blank or (if asked) still."""

    name = "filter_quality"

    def __init__(self, ledgers: Path, config: FilterConfig) -> None:
        super().__init__(ledgers)
        self.config = config

    def judge(self, record: Record) -> tuple[Record | None, str]:
        """See Filter."""
        assert record.view is not None
        bounds = self.config
        short, long = sorted((record.height, record.width))
        if short < bounds.min_side:
            return None, f"too small: {record.width}x{record.height} under min_side={bounds.min_side}"
        if long > bounds.max_aspect * short:
            return None, f"too elongated: {record.width}x{record.height} over max_aspect={bounds.max_aspect}"
        is_video = record.fps > 0
        if is_video and record.num_frames < bounds.min_frames:
            return None, f"too short: {record.num_frames} frames under min_frames={bounds.min_frames}"
        scores = quality_scores(record.view)
        if scores["contrast"] < bounds.min_contrast:
            return None, f"blank: contrast {scores['contrast']} under min_contrast={bounds.min_contrast}"
        if is_video and scores["motion"] < bounds.min_motion:
            return None, f"still: motion {scores['motion']} under min_motion={bounds.min_motion}"
        return replace(record, scores=scores), ""
