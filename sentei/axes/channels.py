"""channels: images keep feature maps.

| query | candidate | score used to choose | value if kept | usual rule |
|---|---|---|---|---|
| image | feature map | z_c, its squeeze-and-excitation logit | W_c ∗ m_c, weighed by σ(z_c) | All (soft), TopK |

    y = β + Σ over the maps c kept of  σ(z_c) · W_c ∗ m_c        z = E relu(S mean(m))

All is squeeze-and-excitation, exactly. A map that is dropped is an input channel that the next convolution need not
read: where all images of a call keep the same maps, one image or a Fixed choice, the others are cut out of maps and
weights; else they are zeroed, and nothing is saved.
Reference: Hu, Shen, Sun 2018, arXiv 1709.01507 (squeeze-and-excitation).
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.axis import Axis
from sentei.core.cost import Cost
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.precision import are_alike, product_dtype
from sentei.core.rules import All, Capacity, Rule, rule_from_json
from sentei.core.selection import Selection

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How feature maps are chosen.

    Args:
        rule: All is plain squeeze-and-excitation.
    """

    rule: Rule = field(default_factory=All)

    def __post_init__(self):
        # Capacity looks along the queries, and an image has but one: itself.
        if not isinstance(self.rule, Rule) or isinstance(self.rule, Capacity):
            raise RuleError("channels.Config", expected="rule a Rule that looks at each image alone", got=repr(self),
                            do="change that field")

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {"rule": self.rule.to_json()}

    @classmethod
    def from_json(cls, value: dict) -> "Config":
        """The configuration written by `to_json`; unknown or missing keys are refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__):
            raise FileError("channels.Config", expected=f"the keys {', '.join(cls.__dataclass_fields__)}",
                            got=repr(value)[:200], do="write plans with sentei")
        rule = rule_from_json(value["rule"])
        try:
            return cls(rule=rule)
        except RuleError as error:
            raise FileError("channels.Config", expected=error.expected, got=repr(value)[:200],
                            do="write plans with sentei") from error


class Channels(Axis):
    """A convolution over gated feature maps, of which it reads those a rule keeps. It has no parameters.

    Inputs: maps [B, C, Y, X], logits [B, C], the convolution's weight [O, C, KY, KX] and optionally its bias [O];
    returns [B, O, Y', X']. Gradients flow through what is kept, to the logits by way of its gates, not through the
    choice.

    Args:
        config: how to choose.
        stride, padding, dilation: of the convolution, (vertical, horizontal).
    """

    def __init__(self, config: Config, *, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1)):
        super().__init__(config.rule)
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def score(self, maps, logits, weight, bias=None):
        _check(maps, logits, weight, bias)
        return torch.zeros_like(logits[:, None]) if isinstance(self.rule, All) else logits[:, None].detach()

    def select(self, scores, maps, logits, weight, bias=None):
        return super().select(scores, maps, logits, weight, bias).weigh(logits.sigmoid()[:, None])

    def apply(self, selection, maps, logits, weight, bias=None):
        how = _how(selection)
        if how == "everything":
            return self.convolve(maps, selection.weights[:, 0], weight, bias)
        if how == "masked":
            # A weight of 0 would not silence a NaN.
            kept = maps.masked_fill(~selection.mask()[:, 0, :, None, None], 0)
            return self.convolve(kept, selection.dense_weights()[:, 0], weight, bias)
        ids = selection.ids[0, 0]
        return self.convolve(maps[:, ids], selection.weights[:, 0], weight[:, ids], bias)

    def convolve(self, maps: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
                 ) -> torch.Tensor:
        """The convolution of maps [B, C, Y, X], each times its gate [B, C]; of no map it is the bias alone."""
        if 0 in maps.shape[:2]:
            empty = maps.new_zeros(maps.shape[0], weight.shape[0], *self.output_size(maps, weight),
                                   dtype=product_dtype(maps))
            return empty if bias is None else empty + bias[:, None, None].to(empty.dtype)
        return F.conv2d(maps * gates[..., None, None], weight, bias, self.stride, self.padding, self.dilation)

    def output_size(self, maps: torch.Tensor, weight: torch.Tensor) -> Pair:
        """Y' and X'."""
        sizes = zip(maps.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return tuple(max((size + 2 * pad - gap * (kernel - 1) - 1) // step + 1, 0)
                     for size, kernel, step, pad, gap in sizes)

    def account(self, selection, maps, logits, weight, bias=None):
        rows, columns = self.output_size(maps, weight)
        work = rows * columns * weight.shape[0] * weight.shape[2] * weight.shape[3]
        kept, permitted = int(selection.count().sum()), int(selection.permitted.sum())
        how = _how(selection)
        reason = {"everything": "every map is kept", "gathered": "all images keep the same maps",
                  "masked": "images keep different maps: dropped ones are zeroed and nothing is saved"}[how]
        done = maps.shape[0] * maps.shape[1] if how == "masked" else kept
        share = done / (maps.shape[0] * maps.shape[1]) if maps.numel() else 1
        moved = (maps.numel() + weight.numel()) * share + maps.shape[0] * weight.shape[0] * rows * columns
        cost = Cost(multiply_adds=done * work, dense_multiply_adds=permitted * work,
                    bytes=round(moved) * maps.element_size())
        return cost, how, reason

    def shortcut(self, maps, logits, weight, bias=None):
        if not isinstance(self.rule, All):
            return None
        _check(maps, logits, weight, bias)
        return self.convolve(maps, logits.sigmoid(), weight, bias)


class SqueezeExcitation(nn.Module):
    """A gate for each feature map, from the means of all: maps [B, C, Y, X] → the same, each times its gate.

    Args:
        channels: C.
        reduction: by how much the hidden layer is narrower.
    """

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // reduction, 1))
        self.excite = nn.Linear(max(channels // reduction, 1), channels)

    def logits(self, maps: torch.Tensor) -> torch.Tensor:
        """[B, C]: z, whose sigmoid is the gate."""
        return self.excite(F.relu(self.squeeze(maps.mean((2, 3)))))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """The soft layer."""
        return maps * self.logits(maps).sigmoid()[..., None, None]


class GatedConv(nn.Module):
    """Gates and the convolution behind them, around `Channels`: maps [B, C, Y, X] → [B, O, Y', X'].

    Args:
        config: how maps are chosen.
        gate, conv: the two layers, taken over as they are.
    Raises:
        ShapeError: a convolution in groups, with padding of another kind than zeros by number, or of other channels.
    """

    def __init__(self, config: Config, gate: SqueezeExcitation, conv: nn.Conv2d):
        super().__init__()
        plain = (conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
                 and conv.in_channels == gate.excite.out_features)
        if not plain:
            raise ShapeError("channels", expected="a convolution in one group, padded with zeros, of the gate's "
                             f"{gate.excite.out_features} channels", got=repr(conv), do="use another convolution")
        self.gate, self.conv = gate, conv
        self.channels = Channels(config, stride=conv.stride, padding=conv.padding, dilation=conv.dilation)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """The convolution of what the gates keep."""
        return self.channels(maps, self.gate.logits(maps), self.conv.weight, self.conv.bias)


class SmallCNN(nn.Module):
    """A small image classifier: x [B, inputs, Y, X] → logits [B, classes].

    A convolution, then `depth` gated ones that halve the image, then the mean over places and a linear layer.

    Args:
        config: how maps are chosen; None leaves out the gates: the static network, the same for every image.
        inputs, classes: channels of the image, and how many classes.
        width: feature maps of each layer.
        depth: gated convolutions.
    """

    def __init__(self, config: Config | None, *, inputs: int, classes: int, width: int = 32, depth: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(inputs, width, 3, padding=1)
        convs = [nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(depth)]
        self.layers = nn.ModuleList(convs if config is None else
                                    [GatedConv(config, SqueezeExcitation(width), conv) for conv in convs])
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        maps = F.relu(self.stem(x))
        for layer in self.layers:
            maps = F.relu(layer(maps))
        return self.head(maps.mean((2, 3)))


def from_dense(layer: nn.Sequential | GatedConv, config: Config) -> GatedConv:
    """The same gates and convolution with chosen maps, as a copy; with the rule All it computes the same function.

    Args:
        layer: nn.Sequential(SqueezeExcitation, nn.Conv2d), or a layer of this room.
    Raises:
        ShapeError: other layers, or a convolution that is not plain; see `GatedConv`.
    """
    parts = (layer.gate, layer.conv) if isinstance(layer, GatedConv) else tuple(layer.children())
    if not (isinstance(layer, GatedConv | nn.Sequential) and [type(part) for part in parts]
            == [SqueezeExcitation, nn.Conv2d]):
        raise ShapeError("channels", expected="a SqueezeExcitation and the nn.Conv2d behind it", got=repr(layer)[:200],
                         do="put the two into an nn.Sequential")
    return GatedConv(config, *copy.deepcopy(parts)).train(layer.training)


def _how(selection: Selection) -> str:
    """Whether the maps kept are everything, the same for all images ("gathered"), or neither ("masked")."""
    if bool((selection.count() == selection.num_candidates).all()):
        return "everything"
    return "gathered" if bool((selection.ids == selection.ids[:1]).all()) else "masked"


def _check(maps: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    fits = (maps.dim() == weight.dim() == 4 and logits.shape == maps.shape[:2] and weight.shape[1] == maps.shape[1]
            and (bias is None or bias.shape == weight.shape[:1]))
    if not fits or not are_alike(maps, logits, weight, bias):
        raise ShapeError("channels", expected="maps [B, C, Y, X], logits [B, C], weight [O, C, KY, KX] and bias [O], "
                         "of one floating dtype and device",
                         got=", ".join(f"{part.dtype} {list(part.shape)}" for part in (maps, logits, weight, bias)
                                       if part is not None), do="give tensors that fit")
