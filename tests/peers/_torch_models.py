"""Networks in PyTorch with the layer names of released checkpoints, and checkpoints of them.

Runs in the peers' environment: `python _torch_models.py FOLDER` writes, for each case, the inputs,
logits and input gradients of a network with random weights and batch-norm statistics, and its
weights as a checkpoint of one of the kinds in circulation.
"""

import pathlib
import sys
from collections import OrderedDict

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def conv(inputs, outputs, kernel=3, stride=1, padding=None):
    padding = kernel // 2 if padding is None else padding
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)


class Residual(nn.Module):
    """Post-activation block; `project` is "shortcut" or "downsample"."""

    def __init__(self, inputs, width, stride, bottleneck, project):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        channels = (inputs, *[width] * (len(kernels) - 1), outputs)
        self.count = len(kernels)
        for i in range(self.count):
            layer = conv(channels[i], channels[i + 1], kernels[i], strides[i])
            self.add_module(f"conv{i + 1}", layer)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        self.project = project
        if stride != 1 or inputs != outputs:
            layers = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            self.add_module(project, nn.Sequential(*layers))

    def forward(self, x):
        h = x
        for i in range(1, self.count + 1):
            h = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(h))
            h = F.relu(h) if i < self.count else h
        return F.relu(h + (getattr(self, self.project)(x) if hasattr(self, self.project) else x))


class ResNet(nn.Module):
    def __init__(self, stages, width, classes, bottleneck=False, imagenet=False):
        super().__init__()
        self.imagenet = imagenet
        self.conv1 = conv(3, width, 7, 2) if imagenet else conv(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for i, blocks in enumerate(stages):
            layers = []
            for j in range(blocks):
                stride = 2 if i and not j else 1
                name = "downsample" if imagenet else "shortcut"
                layers.append(Residual(channels, width * 2**i, stride, bottleneck, name))
                channels = width * 2**i * (4 if bottleneck else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.add_module("fc" if imagenet else "linear", nn.Linear(channels, classes))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return (self.fc if self.imagenet else self.linear)(x.mean((2, 3)))


class PreActivation(nn.Module):
    def __init__(self, inputs, outputs, stride, activated):
        super().__init__()
        self.activated = activated
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x):
        h = F.relu(self.bn1(x))
        if hasattr(self, "shortcut"):
            x = self.shortcut(h if self.activated else x)
        return x + self.conv2(F.relu(self.bn2(self.conv1(h))))


class PreActResNet(nn.Module):
    def __init__(self, width, classes, activated, final):
        super().__init__()
        self.conv1 = conv(3, width)
        channels = width
        for i in range(4):
            first = PreActivation(channels, width * 2**i, 2 if i else 1, activated)
            channels = width * 2**i
            second = PreActivation(channels, channels, 1, activated)
            self.add_module(f"layer{i + 1}", nn.Sequential(first, second))
        if final:
            self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.conv1(x)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        if hasattr(self, "bn"):
            x = F.relu(self.bn(x))
        return self.linear(x.mean((2, 3)))


class Wide(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs)
        if inputs != outputs:
            self.convShortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x):
        h = F.relu(self.bn1(x))
        x = self.convShortcut(h) if hasattr(self, "convShortcut") else x
        return x + self.conv2(F.relu(self.bn2(self.conv1(h))))


class Stage(nn.Module):
    def __init__(self, name, block, blocks, inputs, outputs, stride):
        super().__init__()
        layers = [block(inputs, outputs, stride)]
        layers += [block(outputs, outputs, 1) for _ in range(blocks - 1)]
        self.name = name
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, x):
        return getattr(self, self.name)(x)


class WideResNet(nn.Module):
    """With the unused second first stage of TRADES."""

    def __init__(self, depth, width, classes):
        super().__init__()
        n, c = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = conv(3, 16)
        self.block1 = Stage("layer", Wide, n, c[0], c[1], 1)
        self.sub_block1 = Stage("layer", Wide, n, c[0], c[1], 1)
        self.block2 = Stage("layer", Wide, n, c[1], c[2], 2)
        self.block3 = Stage("layer", Wide, n, c[2], c[3], 2)
        self.bn1 = nn.BatchNorm2d(c[3])
        self.fc = nn.Linear(c[3], classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def same(x, stride):
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


class DeepMindWide(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = conv(inputs, outputs, 3, stride, 0)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = conv(outputs, outputs)
        if inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x):
        h = F.silu(self.batchnorm_0(x))
        x = self.shortcut(h) if hasattr(self, "shortcut") else x
        h = self.conv_0(same(h, self.stride))
        return x + self.conv_1(F.silu(self.batchnorm_1(h)))


class DeepMindWideResNet(nn.Module):
    def __init__(self, depth, width, classes):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        n, c = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.init_conv = conv(3, 16)
        stages = [Stage("block", DeepMindWide, n, c[i], c[i + 1], 2 if i else 1) for i in range(3)]
        self.layer = nn.Sequential(*stages)
        self.batchnorm = nn.BatchNorm2d(c[3])
        self.logits = nn.Linear(c[3], classes)

    def forward(self, x):
        x = self.layer(self.init_conv((x - self.mean) / self.std))
        return self.logits(F.silu(self.batchnorm(x)).mean((2, 3)))


class DeepMindPreActivation(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_2d_1 = conv(inputs, outputs, 3, stride, 0)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_2d_2 = conv(outputs, outputs)
        if stride != 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, 3, stride, 0)

    def forward(self, x):
        h = F.silu(self.batchnorm_0(x))
        if hasattr(self, "shortcut"):
            x = self.shortcut(same(x, self.stride))
        h = self.conv_2d_1(same(h, self.stride))
        return x + self.conv_2d_2(F.silu(self.batchnorm_1(h)))


class DeepMindPreActResNet(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.conv_2d = conv(3, width)
        channels = width
        for i in range(4):
            first = DeepMindPreActivation(channels, width * 2**i, 2 if i else 1)
            channels = width * 2**i
            second = DeepMindPreActivation(channels, channels, 1)
            self.add_module(f"layer_{i}", nn.Sequential(first, second))
        self.batchnorm = nn.BatchNorm2d(channels)
        self.logits = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.conv_2d((x - self.mean) / self.std)
        for i in range(4):
            x = getattr(self, f"layer_{i}")(x)
        return self.logits(F.silu(self.batchnorm(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1)
        return self.proj((weight @ v).transpose(1, 2).reshape(batch, tokens, width))


class Encoder(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, image, patch, width, depth, heads, classes):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*[Encoder(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class DnCNN(nn.Module):
    def __init__(self, depth, width):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [conv(width, width), nn.BatchNorm2d(width, eps=1e-4), nn.ReLU()]
        self.dncnn = nn.Sequential(*layers, conv(width, 3))

    def forward(self, x):
        return x - self.dncnn(x)


def cases():
    """Name, network, side of the images, normalised outside of the network."""
    yield "ResNet18", ResNet((2, 2, 2, 2), 8, 10), 32, True
    yield "ResNet50", ResNet((1, 2, 1, 1), 8, 7, bottleneck=True, imagenet=True), 64, True
    yield "PreActResNet18 input", PreActResNet(8, 10, False, False), 32, True
    yield "PreActResNet18 activated", PreActResNet(8, 10, True, True), 32, True
    yield "PreActResNet18 deepmind", DeepMindPreActResNet(8, 10), 32, False
    yield "WideResNet", WideResNet(16, 2, 10), 32, True
    yield "WideResNet deepmind", DeepMindWideResNet(16, 2, 10), 32, False
    yield "ViT", ViT(16, 4, 24, 2, 3, 10), 16, True
    yield "DnCNN", DnCNN(5, 8), 16, False


def save(path, network, kind):
    """Kinds: as RobustBench keeps them, a parallel module nested with its training, and so on."""
    state = network.state_dict()
    if kind == 0:
        torch.save(state, path)
    elif kind == 1:
        prefixed = OrderedDict((f"module.{k}", v) for k, v in state.items())
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 1}]}
        whole = {"state_dict": prefixed, "optimizer": optimizer, "best": np.float64(0.5)}
        torch.save(whole, path, _use_new_zipfile_serialization=False)
    else:
        network = nn.DataParallel(network)
        torch.save({"net": dict(network.named_parameters()) | dict(network.named_buffers())}, path)


def main(folder):
    folder = pathlib.Path(folder)
    torch.manual_seed(0)
    for number, (name, network, side, outside) in enumerate(cases()):
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
        network.eval()
        x = torch.rand(3, 3, side, side, requires_grad=True)
        mean, std = (torch.tensor(a).view(3, 1, 1) for a in (MEAN, STD))
        logits = network((x - mean) / std if outside else x)
        (gradient,) = torch.autograd.grad((logits**2).sum(), x)
        save(folder / f"{name}.pt", network, number % 3)
        arrays = {"x": x, "logits": logits, "gradient": gradient}
        if name == "DnCNN":
            arrays["logits"] = logits.permute(0, 2, 3, 1)
        for key in ("x", "gradient"):
            arrays[key] = arrays[key].permute(0, 2, 3, 1)
        arrays = {key: value.detach().numpy() for key, value in arrays.items()}
        np.savez(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
