"""The registry of unlearning methods: what each is called, what it needs, and where its function is. No torch here.

A method is one file with a function and, where it has numbers of its own, a frozen dataclass of options beside it; and
one entry in a table below. Its file must import torch inside functions only, so that `--help` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Literal

MaskUse = Literal["saliency", "learned", "full"]


@dataclass(frozen=True)
class Method:
    """One way to unlearn.

    Args:
        title: Its name in the literature.
        paper: Where it is described.
        run: "module:function" that carries it out.
        mask: "saliency": trains under the run's mask; "learned": selects weights while it trains; "full": changes what
            it likes within `scope`.
        data: "latents": needs a training set; "prompts": needs prompts alone.
        options: "module:class" of the options that are its own; "" for none.
        stages: "module:function", plan → list of `StageCost`, what its training takes; "" for the default.
    """

    name: str
    title: str
    paper: str
    run: str
    mask: MaskUse = "full"
    data: Literal["latents", "prompts"] = "latents"
    options: str = ""
    stages: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        """The function that carries it out, imported now."""
        function: Callable[..., Any] = imported(self.run)
        return function

    @property
    def options_class(self) -> type | None:
        """The dataclass of its own options."""
        return imported(self.options) if self.options else None

    def options_of(self, options: Any) -> Any:
        """Its own options out of all of a run's."""
        kind = self.options_class
        return kind(**{item.name: getattr(options, item.name, item.default) for item in fields(kind)}) if kind else None


def imported(place: str) -> Any:
    """What "module:name" names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _table(*methods: Method) -> Mapping[str, Method]:
    return {method.name: method for method in methods}


_HOME = "salun.diffusion.methods"
DIFFUSION: Mapping[str, Method] = _table(
    Method("salun", "SalUn", "Fan et al., ICLR 2024, arXiv:2310.12508", f"{_HOME}.salun:salun", mask="saliency"),
    Method(
        "salun-soft",
        "SalUn-soft",
        "Fan et al., ICLR 2024, arXiv:2310.12508, appendix B",
        f"{_HOME}.salun:salun_soft",
        mask="learned",
    ),
    Method(
        "esd",
        "ESD",
        "Gandikota et al., ICCV 2023, arXiv:2303.07345",
        f"{_HOME}.esd:esd",
        data="prompts",
        options=f"{_HOME}.esd:EsdOptions",
        stages=f"{_HOME}.esd:stages",
    ),
    Method(
        "uce",
        "UCE",
        "Gandikota et al., WACV 2024, arXiv:2308.14761",
        f"{_HOME}.uce:uce",
        data="prompts",
        options=f"{_HOME}.uce:UceOptions",
        stages=f"{_HOME}.uce:stages",
    ),
)
