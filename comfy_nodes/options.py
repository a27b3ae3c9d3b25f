"""SalUn Options: the less common options, for all nodes that it is connected to."""

from __future__ import annotations

from typing import Any

from .inputs import IN_VIEW, SHARED, erase_options, explicit, option_inputs
from .types import OPTIONS, Node, OptionValues


class SalUnOptions(Node):
    """The core's options that no other node has."""

    TITLE = "SalUn Options"
    RETURN_TYPES, RETURN_NAMES = (OPTIONS,), ("options",)
    OUTPUT_TOOLTIPS = ("Options of SalUn Training Data, Saliency Mask, Erase, Evaluate and Attack.",)
    DESCRIPTION = (
        "Less common options of an erasure: sampling, training set, method, detector, memory; the others are advanced "
        "inputs. Without this node the defaults apply. Connect it to every SalUn node that takes options, so that "
        "they agree."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        advanced = [name for name in SHARED if name not in IN_VIEW]
        inputs = option_inputs(*IN_VIEW, *advanced, advanced=advanced)
        return {"required": {}, "optional": inputs}  # a prompt need not name them all

    def run(self, **values: Any) -> tuple[OptionValues]:
        erase_options(values)  # an invalid option is rejected here, before anything is computed
        return (explicit(values),)
