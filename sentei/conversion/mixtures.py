"""What a family of mixtures tells of its experts: how many there are, how they weigh, and how they lie in files.

In a model of transformers the experts of a layer are two stacked weights, `experts.gate_up_proj` [E, 2F, D] and
`experts.down_proj` [E, D, F], behind a router `gate` [E, D]. In published files each expert has three matrices of its
own; transformers stacks them as it loads, and takes files of stacked ones too.
"""

import re
from dataclasses import dataclass

from sentei.core.errors import FileError, shown

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The part of a family's row that tells of its experts.

    Args:
        number: what the config calls the number of experts.
        matrices: the names in files of an expert's gate, up and down.
        place: the name in files of the module that the model calls "mlp".
    """

    number: str
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    place: str = "mlp"

    def check(self, config, where: str) -> None:
        """Raises FileError where a token is to keep more experts than there are."""
        kept, number = config.num_experts_per_tok, getattr(config, self.number)
        if not 1 <= kept <= number:
            raise FileError(where, expected=f"'num_experts_per_tok' from 1 to the {number:,} experts", got=shown(kept),
                            do="download the file again from where it was published")

    def own_name(self, name: str) -> str:
        """What the model calls a tensor of a file, but for an expert's own."""
        return name.replace(f".{self.place}.", ".mlp.")

    def stacked(self, found: Shapes, where: str) -> Shapes:
        """Shapes as the model has them, the experts of each layer together.

        Args:
            found: by `own_name`.
        Raises:
            FileError: experts that are not numbered from 0, of unlike shapes, or there twice.
        """
        own = re.compile(rf"(.*\.experts)\.(0|[1-9]\d{{0,5}})\.({'|'.join(self.matrices)})\.weight")
        shapes, layers = {}, {}
        for name, shape in found.items():
            match = own.fullmatch(name)
            if match is None:
                shapes[name] = shape
            else:
                layers.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = shape
        for path, matrices in layers.items():
            gate, up, down = (self._of(path, name, matrices.get(name, {}), where) for name in self.matrices)
            if gate != up or len(gate) != 3 or f"{path}.gate_up_proj" in shapes or f"{path}.down_proj" in shapes:
                raise _not_stacked(where, f"{path}: {gate}, {up} and {down}")
            shapes |= {f"{path}.gate_up_proj": (gate[0], 2 * gate[1], gate[2]), f"{path}.down_proj": down}
        return shapes

    def _of(self, path: str, name: str, each: dict[int, tuple[int, ...]], where: str) -> tuple[int, ...]:
        """The shape of one matrix of every expert together."""
        if set(each) != set(range(len(each))) or len(set(each.values())) != 1:
            raise _not_stacked(where, f"{path}.*.{name}: {len(each):,} of {len(set(each.values())):,} shapes")
        return len(each), *each[0]


def _not_stacked(where: str, got: str) -> FileError:
    return FileError(where, expected="of every expert, numbered from 0, one gate, up and down, of one shape",
                     got=shown(got), do="download the model again")
