"""Image classifiers built here: a small one, ResNet-18, ResNet-20 and VGG-16-BN."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class SmallCNN(nn.Module):
    """Three convolutions with BatchNorm, pooled to 2×2: 28,000 weights, for images as small as the digits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        out: Tensor = self.fc(x.flatten(1))
        return out


class Block(nn.Module):
    """Two 3×3 convolutions and a skip connection (He et al. 2016, section 3).

    Args:
        projects: Whether a skip connection to another shape is a 1×1 convolution (option B). Otherwise it has no
            weights: it takes every second pixel, and zeros as the new channels (option A).
    """

    def __init__(self, inside: int, out: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - inside
        self.downsample: nn.Module | None = None
        if projects and (stride != 1 or inside != out):
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        around = x
        if self.downsample is not None:
            around = self.downsample(x)
        elif self.more:
            around = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(around + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """A residual network with the CIFAR stem (3×3, stride 1, no pooling). Parameters are named as torchvision's.

    Args:
        widths: Channels of each stage; from the second on, a stage halves height and width.
        blocks: Blocks of a stage.
        projects: As in `Block`.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: int, projects: bool) -> None:
        super().__init__()
        inside, self.stages = widths[0], len(widths)
        self.conv1 = nn.Conv2d(channels, inside, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        for number, width in enumerate(widths, 1):
            first = Block(inside, width, 1 if number == 1 else 2, projects)
            others = [Block(width, width, 1, projects) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *others))
            inside = width
        self.fc = nn.Linear(inside, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def resnet18(channels: int, classes: int) -> ResNet:
    """ResNet-18 (He et al. 2016, table 1)."""
    return ResNet(channels, classes, (64, 128, 256, 512), 2, projects=True)


def resnet20(channels: int, classes: int) -> ResNet:
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2, n = 3)."""
    return ResNet(channels, classes, (16, 32, 64), 3, projects=False)


class VGG16(nn.Module):
    """VGG-16 with BatchNorm (Simonyan & Zisserman 2014, configuration D) and one linear layer, as for CIFAR."""

    PLAN = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0 halves the image

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in self.PLAN:
            if not width:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))  # so that images under 32 pixels do not vanish
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return out
