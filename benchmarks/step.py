"""A training step on a UNet of Stable Diffusion 1.5's shape with random weights: salun against the reference.

    python benchmarks/step.py                                   CPU, small latents
    python benchmarks/step.py --device cuda --latent 64 --batch 1 4 8 --dtype bf16 --peak-tflops 990

The reference reproduces the authors' loop: float32 weights, Adam over all of them, int64 masks multiplied into the
gradients at each step, and the VAE encoding images at each step (two forget encodings and one of retain). Each row runs
in its own process, which gives its peak memory. Ratios are to the reference in the first row.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VARIANTS: dict[str, dict[str, Any]] = {
    "reference loop, fp32": {"reference": True, "dtype": "fp32"},
    "salun, fp32": {"dtype": "fp32"},
    "salun, fp32, gradient checkpointing": {"dtype": "fp32", "checkpoint": True},
    "salun, bf16": {"dtype": "bf16"},
    "salun, bf16, gradient checkpointing": {"dtype": "bf16", "checkpoint": True},
    "salun, bf16, --low-vram": {"dtype": "bf16", "checkpoint": True, "low_vram": True},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSITY = 0.5


def make_unet(dtype: torch.dtype, device: str) -> Any:
    """The UNet of SD 1.5 (859.5 M parameters), random weights, made on the device in the dtype at once."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(0, 0.02)
    return unet.eval().requires_grad_(False)


def inputs(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (2b, 4, s, s), timesteps (2b,) and encoded prompts (2b, 77, 768) of b forget and b retain samples."""
    n = 2 * args.batch[0]
    x = torch.randn(n, 4, args.latent, args.latent, device=args.device)
    return x, torch.randint(1000, (n,), device=args.device), torch.randn(n, 77, 768, device=args.device, dtype=dtype)


def reference_step(args: argparse.Namespace) -> Any:
    """One step of the authors' loop, as a function."""
    from diffusers import AutoencoderKL

    unet = make_unet(torch.float32, args.device).requires_grad_(True)
    kinds: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    vae = AutoencoderKL(**kinds).to(args.device).requires_grad_(False)
    vae.decoder = nn.Identity()
    masks = {name: (torch.rand_like(p) < DENSITY).long() for name, p in unet.named_parameters()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-5)
    half, side = args.batch[0], 8 * args.latent
    _, t, prompts = inputs(args, torch.float32)
    images = torch.randn(half, 3, side, side, device=args.device)

    def step() -> None:
        with torch.no_grad():
            forget, again, retain = (vae.encode(images).latent_dist.sample() for _ in range(3))
        optimizer.zero_grad()
        with torch.no_grad():
            target = unet(again, t[:half], prompts[:half]).sample
        loss = F.mse_loss(unet(forget, t[:half], prompts[:half]).sample, target)
        retain_loss = F.mse_loss(unet(retain, t[half:], prompts[half:]).sample, torch.randn_like(retain))
        (retain_loss + 0.5 * loss).backward()
        for name, parameter in unet.named_parameters():
            parameter.grad *= masks[name]
        optimizer.step()

    return step


def salun_step(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """One step of salun's loop, as a function: with the forward pass of the frozen target."""
    from salun.masking.mask import Mask
    from salun.masking.optim import MaskedOptimizer

    dtype = DTYPES[settings["dtype"]]
    unet = make_unet(dtype, args.device)
    if settings.get("checkpoint"):
        unet.enable_gradient_checkpointing()
        unet.train()
    parameters = dict(unet.named_parameters())
    generator = torch.Generator().manual_seed(0)
    masks = {n: Mask.from_dense({n: torch.rand(p.shape, generator=generator) < DENSITY}) for n, p in parameters.items()}
    mask = Mask({n: m.bits[n] for n, m in masks.items()}, {n: m.shapes[n] for n, m in masks.items()})
    cpu_offload = bool(settings.get("low_vram"))

    def make(masters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(masters, lr=1e-5, fused=True)

    optimizer = MaskedOptimizer(parameters, mask, make, "step", cpu_offload=cpu_offload)
    x, t, prompts = inputs(args, dtype)
    half = len(x) // 2

    def step() -> None:
        with torch.no_grad():
            frozen = unet(x.to(dtype), t, prompts).sample.float()
        predicted = unet(x.to(dtype), t, prompts).sample.float()
        loss = F.mse_loss(predicted[:half], frozen[:half]) + F.mse_loss(predicted[half:], frozen[half:].roll(1, 0))
        optimizer.backward(loss)

    return step


def measure(args: argparse.Namespace) -> None:
    """Run one row and print its time and memory as JSON."""
    settings = VARIANTS[args.variant]
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step = reference_step(args) if settings.get("reference") else salun_step(args, settings)
    seconds = []
    for _ in range(args.steps + 1):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.max_memory_allocated() if cuda else None
    best = sorted(seconds[1:])[len(seconds[1:]) // 2]  # the median, without the first
    print(json.dumps({"seconds": best, "host": host, "device": device}))


def flops(batch: int, latent: int) -> float:
    """Of a step at 64×64: 2b samples forward once without and once with backward (0.80 TFLOP per forward pass)."""
    return 2 * batch * (1 + 3) * 0.80e12 * (latent / 64) ** 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--latent", type=int, default=8, help="Side length of the latents (default: 8)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="Peak bf16 TFLOP/s of the device, to print the utilization")
    parser.add_argument("--only", default="")
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        measure(args)
        return
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, latents {args.latent}²,", end=" "
    )
    print(f"density {DENSITY}, TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}")
    for batch in args.batch:
        base: dict[str, Any] | None = None
        for name in VARIANTS:
            if args.only not in name:
                continue
            command = [sys.executable, __file__, "--device", args.device, "--latent", str(args.latent)]
            command += ["--batch", str(batch), "--steps", str(args.steps), "--variant", name]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"killed ({done.returncode})"])[-1]
                print(f"batch {batch}  {name:<38} failed: {reason}", flush=True)
                continue
            result = json.loads(done.stdout.splitlines()[-1])
            base = base or result
            memory = result["device"] or result["host"]
            before = base["device"] or base["host"]
            cells = f"{result['seconds']:7.2f} s/step  {memory / 2**30:6.2f} GiB"
            cells += f"  {base['seconds'] / result['seconds']:5.2f} × as fast  {memory / before:5.2f} × the memory"
            if args.peak_tflops:
                cells += f"  {flops(batch, args.latent) / result['seconds'] / args.peak_tflops / 1e12:6.1%} of the peak"
            print(f"batch {batch}  {name:<38} {cells}", flush=True)


if __name__ == "__main__":
    main()
