"""SalUn's mask and losses compared with its authors' code for Stable Diffusion, on the same random tensors.

    python -m benchmarks.authors_salun PATH

PATH is a clone (a checkout or a bare git directory) of github.com/OPTML-Group/Unlearn-Saliency, which is not part of
this repository. The statements of `SD/train-scripts/generate_mask.py` and of one step of `random_label.py` and
`nsfw_removal.py` run unchanged, with stand-ins for the network, the data and the optimizer around them; salun computes
its mask and the first step with the paper's choices (`--recipe paper`: targets of the model in training, the noise as
retain target, no anchor samples). Prints how far apart the losses and the gradients are, and in how many weights the
masks differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.authors_network import ANCHOR, CONCEPT, Model, N, first_step, gradients_of, network_of, show
from benchmarks.authors_source import Source, Torch, commit
from salun.diffusion.losses import ErasureData, draw, saliency_losses
from salun.diffusion.methods.salun import salun
from salun.masking.mask import Mask
from salun.masking.saliency import scores_from_losses
from salun.options import NoOptions

ALPHA, GUIDANCE, DENSITY, SEED = 0.1, 7.5, 0.5, 0
"""α and the guidance of their defaults."""


class Recorded:
    """A noise schedule that keeps what noise was added to: x_0, noise, t."""

    def __init__(self, schedule: Any) -> None:
        self._schedule, self.drawn = schedule, list[tuple[Tensor, Tensor, Tensor]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Any:
        self.drawn.append((x_0, noise, t))
        return self._schedule.add_noise(x_0, noise, t)


class LatentDiffusion(nn.Module):
    """What their code uses of the CompVis model, around a small network.

    Args:
        x_0, noise, t: Of the samples to forget, and after them of those to retain.
        prompts: Embeddings (n, tokens, width) by text.
    """

    first_stage_key, num_timesteps, device = "jpg", 1000, "cpu"

    def __init__(self, model: Model, network: nn.Module, prompts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = network
        self.add_noise, self.prompts, self.call = model.schedule.add_noise, prompts, network_of(network)
        self.retained: tuple[Tensor, ...] = ()

    def get_input(self, batch: Mapping[str, Any], key: str) -> tuple[Tensor, Tensor]:
        """Latents, which stand for the images, and embeddings."""
        return batch[key].permute(0, 3, 1, 2), torch.cat([self.prompts[text] for text in batch["txt"]])

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.add_noise(x_start, noise, t)

    def apply_model(self, x_t: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        return self.call(x_t, t, hidden)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor]:
        """Their loss of training, MSE(noise, prediction), with the t and noise that salun drew."""
        latents, hidden = self.get_input(batch, "jpg")
        t, noise = self.retained
        return (F.mse_loss(self.call(self.add_noise(latents, noise, t), t, hidden), noise),)


def compare_step(clone: Path, file: str) -> None:
    """One step of a training loop: MSE(ε_θ(x_t, c_f), sg ε_θ(x_t, c_a)) + α·MSE(ε_θ(x_t, c_r), ε)."""
    model = Model()
    run = {"harden": 0, "harden_weight": 0.0, "target_guidance": 0.0, "gradient_surgery": False,
           "forget_timesteps": "0-1"}  # fmt: skip
    recipe = {"anchor_share": 0.0, "target": "online", "retain_target": "noise", "retain_weight": ALPHA}
    task, _ = first_step(model, salun, NoOptions(), run, **recipe)
    batch = draw(model, task.training_set, N, 0.0, SEED, 0)  # type: ignore[arg-type]
    retained = {f"retained {i}": batch.prompts.hidden[N + i : N + i + 1] for i in range(N)}
    texts = {CONCEPT: batch.prompts.hidden[:1], ANCHOR: batch.targets.hidden[:1], **retained}
    theirs = LatentDiffusion(model, deepcopy(model.network), texts)
    theirs.retained = batch.t[N:], batch.noise[N:]
    x_f, x_r = batch.x_0[:N], batch.x_0[N:]
    nsfw = file == "nsfw_removal.py"
    descriptions = [CONCEPT, ANCHOR, *retained]  # the class after the one to forget is its anchor
    around = {
        "model": theirs, "optimizer": MagicMock(), "criteria": nn.MSELoss(), "alpha": ALPHA, "batch_size": N,
        "losses": [], "mask_path": None, "epoch": 0, "time": MagicMock(), "sleep": lambda seconds: None,
        "torch": Torch(randn_like=lambda *a, **n: batch.noise[:N], randint=lambda *a, **n: batch.t[:N]),
    }  # fmt: skip
    if nsfw:  # one prompt for what is retained, which is the anchor's: here that of the first retained sample
        around |= {"word_nude": CONCEPT, "word_wear": ANCHOR, "forget_images": x_f, "remain_iter": iter([x_r])}
        theirs.prompts = {CONCEPT: texts[CONCEPT], ANCHOR: texts[ANCHOR]}
        theirs.shared_step = _retaining(theirs, retained)  # type: ignore[method-assign]
        body = Source(clone, f"SD/train-scripts/{file}").loop("(i, forget_images)", "enumerate(forget_dl)")
    else:
        labels = [0] * N, range(2, 2 + N)
        around |= {"class_to_forget": "0", "descriptions": descriptions, "forget_images": x_f,
                   "forget_labels": labels[0], "remain_iter": iter([(x_r, labels[1])])}  # fmt: skip
        body = Source(clone, f"SD/train-scripts/{file}").loop("(i, (forget_images, forget_labels))",
                                                              "enumerate(forget_dl)")  # fmt: skip
    names = Source(clone, f"SD/train-scripts/{file}").run(body, around)
    loss, gradients = names["loss"], gradients_of(theirs.model.diffusion_model)
    show(f"{file} {commit(clone)}", task, loss, gradients)


def _retaining(theirs: LatentDiffusion, retained: Mapping[str, Tensor]) -> Any:
    """Their loss of training under the prompts of the retained samples."""

    def shared_step(batch: Mapping[str, Any]) -> tuple[Tensor]:
        t, noise = theirs.retained
        x_t = theirs.add_noise(batch["jpg"].permute(0, 3, 1, 2), noise, t)
        return (F.mse_loss(theirs.call(x_t, t, torch.cat(list(retained.values()))), noise),)

    return shared_step


def compare_mask(clone: Path) -> None:
    """The mask of the half of the weights with the largest |Σ gradients| of −MSE(ε, (1+w)·ε(c_f) − w·ε(∅))."""
    model = Model(moved=False)
    latents = torch.randn(2 * N, *model.latent_shape)
    prompt, empty = model.encode([CONCEPT]), model.encode([""])
    data = ErasureData(latents, latents, latents, prompt.expand(2 * N), prompt, prompt, empty)
    theirs = LatentDiffusion(model, deepcopy(model.network), {CONCEPT: prompt.hidden, "": empty.hidden})
    schedule = model.schedule = Recorded(model.schedule)
    parameters = model.parameters()
    losses = saliency_losses(model, data, GUIDANCE, N, 1, SEED)  # type: ignore[arg-type]
    mine, drawn = Mask.from_scores(scores_from_losses(parameters, losses), DENSITY), schedule.drawn
    noises, ts, saved = iter([noise for _, noise, _ in drawn]), iter([t for *_, t in drawn]), dict[str, Any]()
    around = {
        "setup_model": lambda *a: theirs,
        "setup_forget_data": lambda *a: ([(x, [0] * N) for x, *_ in drawn], [CONCEPT]),
        "tqdm": MagicMock(), "os": MagicMock(),
        "torch": Torch(randint=lambda *a, **n: next(ts), randn_like=lambda *a, **n: next(noises),
                       save=lambda made, path: saved.update(made)),
    }  # fmt: skip
    function = Source(clone, "SD/train-scripts/generate_mask.py").defined("generate_mask", **around)["generate_mask"]
    function("0", GUIDANCE, N, 1, 1e-5, None, None, None, "cpu")
    differing = sum(int((mine.dense(name) != saved[name].bool()).sum()) for name in parameters)
    print(f"generate_mask.py {commit(clone)}: masks differ in {differing} of {mine.total} weights, "
          f"{mine.selected} of them selected")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("clone", type=Path)
    clone = parser.parse_args().clone
    torch.set_default_dtype(torch.float64)
    compare_mask(clone)
    for file in ("random_label.py", "nsfw_removal.py"):
        compare_step(clone, file)


if __name__ == "__main__":
    main()
