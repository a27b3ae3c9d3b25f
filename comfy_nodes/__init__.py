"""ComfyUI nodes: each wraps a MODEL, CLIP and VAE of the graph and calls the core. ComfyUI is imported in functions."""

from __future__ import annotations

from .concept import SalUnConcept
from .data import SalUnTrainingData
from .delta import SalUnApplyDelta, SalUnLoadDelta, SalUnSaveAsLora, SalUnSaveDelta, SalUnSaveErasedCheckpoint
from .erase import SalUnErase
from .evaluate import SalUnEvaluate
from .mask import SalUnCombineMasks, SalUnLoadMask, SalUnMaskHeatmap, SalUnSaliencyMask, SalUnSaveMask
from .options import SalUnOptions

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "SalUnConcept": SalUnConcept,
    "SalUnOptions": SalUnOptions,
    "SalUnTrainingData": SalUnTrainingData,
    "SalUnSaliencyMask": SalUnSaliencyMask,
    "SalUnLoadMask": SalUnLoadMask,
    "SalUnSaveMask": SalUnSaveMask,
    "SalUnCombineMasks": SalUnCombineMasks,
    "SalUnMaskHeatmap": SalUnMaskHeatmap,
    "SalUnErase": SalUnErase,
    "SalUnApplyDelta": SalUnApplyDelta,
    "SalUnLoadDelta": SalUnLoadDelta,
    "SalUnSaveDelta": SalUnSaveDelta,
    "SalUnSaveErasedCheckpoint": SalUnSaveErasedCheckpoint,
    "SalUnSaveAsLora": SalUnSaveAsLora,
    "SalUnEvaluate": SalUnEvaluate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SalUnConcept": "SalUn Concept",
    "SalUnOptions": "SalUn Options",
    "SalUnTrainingData": "SalUn Training Data",
    "SalUnSaliencyMask": "SalUn Saliency Mask",
    "SalUnLoadMask": "SalUn Load Mask",
    "SalUnSaveMask": "SalUn Save Mask",
    "SalUnCombineMasks": "SalUn Combine Masks",
    "SalUnMaskHeatmap": "SalUn Mask Heatmap",
    "SalUnErase": "SalUn Erase",
    "SalUnApplyDelta": "SalUn Apply Delta",
    "SalUnLoadDelta": "SalUn Load Delta",
    "SalUnSaveDelta": "SalUn Save Delta",
    "SalUnSaveErasedCheckpoint": "SalUn Save Erased Checkpoint",
    "SalUnSaveAsLora": "SalUn Save as LoRA",
    "SalUnEvaluate": "SalUn Evaluate",
}
