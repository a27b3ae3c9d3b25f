"""Attention maps of cross-attention: how much each position of the latent attends to each token of the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def cross_attention_inputs(network: nn.Module) -> Iterator[list[tuple[Any, Tensor, Tensor]]]:
    """Context manager: (layer, hidden states, text) of every cross-attention layer that a pass goes through, in order.

    Of the layer nothing but its inputs is noted, so that gradient checkpointing computes the same in both of its
    passes, and whatever computes the layer's attention may be set.
    """
    inputs: list[tuple[Any, Tensor, Tensor]] = []

    def note(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((layer, args[0] if args else kwargs["hidden_states"], kwargs["encoder_hidden_states"]))

    layers = [module for name, module in network.named_modules() if name.endswith(".attn2")]
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def attention_map(layer: Any, hidden: Tensor, text: Tensor) -> Tensor:
    """softmax(QKᵀ/√d) of one of diffusers' attention layers, float32 (n, heads, positions, tokens), with a graph.

    Args:
        hidden: (n, positions, width). text: (n, tokens, width of the text).
    """
    query, key = (of.unflatten(2, (layer.heads, -1)).transpose(1, 2) for of in (layer.to_q(hidden), layer.to_k(text)))
    attention: Tensor = (query.float() @ key.float().mT * layer.scale).softmax(-1)
    return attention
