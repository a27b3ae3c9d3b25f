"""ComfyUI nodes: each wraps a MODEL, CLIP and VAE of the graph and calls the core. ComfyUI is imported in functions."""

from __future__ import annotations

from .attack import SalUnAttack
from .concept import SalUnConcept
from .data import SalUnTrainingData
from .delta import SalUnApplyDelta
from .erase import SalUnErase
from .evaluate import SalUnEvaluate
from .export import SalUnSaveAsLora, SalUnSaveErasedCheckpoint
from .files import SalUnLoadDelta, SalUnLoadMask, SalUnSaveDelta, SalUnSaveMask
from .mask import SalUnCombineMasks, SalUnMaskHeatmap, SalUnSaliencyMask
from .options import SalUnMethod, SalUnOptions
from .types import Node

NODES: tuple[type[Node], ...] = (
    SalUnConcept,
    SalUnOptions,
    SalUnMethod,
    SalUnTrainingData,
    SalUnSaliencyMask,
    SalUnLoadMask,
    SalUnSaveMask,
    SalUnCombineMasks,
    SalUnMaskHeatmap,
    SalUnErase,
    SalUnApplyDelta,
    SalUnLoadDelta,
    SalUnSaveDelta,
    SalUnSaveErasedCheckpoint,
    SalUnSaveAsLora,
    SalUnEvaluate,
    SalUnAttack,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.TITLE for node in NODES}
