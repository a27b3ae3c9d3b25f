"""SalUn Options and SalUn Method: the less common options, for all nodes that they are connected to."""

from __future__ import annotations

from typing import Any

from .inputs import IN_VIEW, METHOD, SHARED, erase_options, explicit, option_inputs, wires
from .types import OPTIONS, Node, OptionValues


class SalUnOptions(Node):
    """The core's options that no other node has."""

    TITLE = "SalUn Options"
    RETURN_TYPES, RETURN_NAMES = (OPTIONS,), ("options",)
    OUTPUT_TOOLTIPS = ("Options of SalUn Training Data, Saliency Mask, Erase, Evaluate and Attack.",)
    DESCRIPTION = (
        "Less common options of an erasure: sampling, training set, detector, memory; the rarest are advanced inputs. "
        "Without this node the defaults apply. Connect it to every SalUn node that takes options, so that they agree."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        advanced = [name for name in SHARED if name not in (*IN_VIEW, *METHOD)]
        inputs = option_inputs(*IN_VIEW, *advanced, advanced=advanced)
        return {"required": {}, "optional": inputs}  # a prompt need not name them all

    def run(self, **values: Any) -> tuple[OptionValues]:
        erase_options(values)  # an invalid option is rejected here, before anything is computed
        return (explicit(values),)


class SalUnMethod(Node):
    """The unlearning method and its own options."""

    TITLE = "SalUn Method"
    RETURN_TYPES, RETURN_NAMES = (OPTIONS,), ("options",)
    OUTPUT_TOOLTIPS = ("Options of SalUn Training Data, Saliency Mask, Erase, Evaluate and Attack.",)
    DESCRIPTION = (
        "Another unlearning method than SalUn, and its own options, which begin with its name. Those of other methods "
        "have no effect. Connect SalUn Options to it to use both."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = option_inputs(*METHOD, advanced=[name for name in METHOD if name != "method"])
        return {"required": {}, "optional": {**wires("options"), **inputs}}

    def run(self, options: OptionValues | None = None, **values: Any) -> tuple[OptionValues]:
        erase_options(values, options)
        return ({**(options or {}), **explicit(values)},)
