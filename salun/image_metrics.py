"""The metrics of images by name, computed on request. Each is a file in `salun.evaluation.image_metrics`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageMetricEntry:
    """An entry of `IMAGE_METRICS`.

    Args:
        title: As in tables, short.
        loads: The function of `ImageMetricInputs` that loads it, "module:name", imported when it is called.
        argument: What may follow the name after a colon, as in "fid:FOLDER"; "" for nothing.
        better: Which values are.
        digits: After the point.
    """

    title: str
    loads: str
    argument: str = ""
    better: str = "lower"
    digits: int = 2


IMAGE_METRICS = {
    "fid": ImageMetricEntry("FID", "salun.evaluation.image_metrics.inception:load_fid", "FOLDER"),
    "kid": ImageMetricEntry("KID", "salun.evaluation.image_metrics.inception:load_kid", "FOLDER", digits=5),
    "cmmd": ImageMetricEntry("CMMD", "salun.evaluation.image_metrics.cmmd:load", "FOLDER", digits=3),
    "clip-score": ImageMetricEntry("CLIP score", "salun.evaluation.image_metrics.clip_score:load", better="higher"),
    "lpips": ImageMetricEntry("LPIPS", "salun.evaluation.image_metrics.lpips:load", digits=3),
}
