"""How many parameters a mask keeps, and the loss that drives the share to a target."""

from __future__ import annotations

import torch
from torch import Tensor

from atp.spaces.space import MaskSpace, Structure


class Budget:
    """Counts the decoder parameters (linears and norms) that a mask keeps; embeddings and lm_head are left out.

    A linear keeps rows * (columns + 1 if it has a bias), each side proportional to the kept decisions of the structure
    that cuts it, so the count is exact for spaces that cut one or both sides. Where nothing is kept of a structure that
    is a whole block, its norms and the bias of its last linear go too. Differentiable in the mask.

    Its tensors lie where those of the space do, and masks are counted there, in float64.
    """

    def __init__(self, space: MaskSpace) -> None:
        self.space = space
        self.device = space.structure_of.device
        rows, cols = self._sides()
        self.separable = not bool(((rows[1] > 0) & (cols[1] > 0)).any())
        """Whether removing a decision saves the same whatever else is kept, but for the last one of a block: no linear
        is cut on both sides."""
        self._row_structure, self._row_scale, self._row_fixed = (part.to(self.device) for part in rows)
        self._col_structure, self._col_scale, self._col_fixed = (part.to(self.device) for part in cols)
        biases = [float(linear.bias) for linears in space.linears for linear in linears.values()]
        self._bias = torch.tensor(biases, device=self.device)
        self._norms = sum(width for norms in space.norms for width in norms.values())
        self._with_block = torch.tensor(
            [float(self._besides(s)) for s in space.structures], device=self.device
        ).double()
        self._sizes = [structure.size for structure in space.structures]
        ones = torch.ones(space.size, dtype=torch.float64, device=self.device, requires_grad=True)
        with torch.enable_grad():  # the caller may have switched gradients off
            total = self._count(ones)
            self._cost = torch.autograd.grad(total, ones)[0].float()
        self.total = int(total)

    def _besides(self, structure: Structure) -> int:
        """Parameters that go with the last decision of a block, and with none before: its norms and its last bias."""
        if structure.block is None or structure.reader is None:
            return 0
        (block,) = (block for block in self.space.blocks if block.module == structure.block)
        norms = sum(width for name, width in self.space.norms[structure.layer].items() if block.holds(name))
        last = self.space.linears[structure.layer][structure.reader]
        return norms + last.out_features * last.bias

    def _sides(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For rows and columns: (structure of each linear, axis size per kept decision, axis size where uncut)."""
        names = self.space.modules
        linears = [layer[name] for layer in self.space.linears for name in names]
        sides = []
        for axis in (0, 1):
            structure_of = torch.zeros(len(linears), dtype=torch.long)
            scale = torch.zeros(len(linears), dtype=torch.float64)
            fixed = torch.tensor([float(m.in_features if axis else m.out_features) for m in linears]).double()
            for index, structure in enumerate(self.space.structures):
                for cut in structure.cuts:
                    if cut.axis == axis:
                        position = structure.layer * len(names) + names.index(cut.module)
                        structure_of[position], fixed[position] = index, 0.0
                        scale[position] = len(cut.owner) / max(structure.size, 1)
            sides.append((structure_of, scale, fixed))
        return sides

    def _count(self, mask: Tensor) -> Tensor:
        mask, layers = mask.double(), self.space.num_layers
        if self.space.equal_layers:  # all layers at once, in few calls
            by_layer = mask.view(layers, -1).split(self._sizes[: len(self._sizes) // layers], dim=1)
            return self.parameters(torch.stack([part.sum(1) for part in by_layer], dim=1).flatten())
        return self.parameters(torch.stack([part.sum() for part in mask.split(self._sizes)]))

    def parameters(self, counts: Tensor) -> Tensor:
        """Decoder parameters that are kept, scalar float64; counts: kept decisions, float64 [structures of the space].

        Differentiable in the counts.
        """
        rows = self._row_fixed + self._row_scale * counts[self._row_structure]
        cols = self._col_fixed + self._col_scale * counts[self._col_structure]
        gone = (self._with_block * (counts <= 0)).sum()
        return (rows * (cols + self._bias)).sum() + self._norms - gone

    def cost(self) -> Tensor:
        """Parameters that removing each decision alone from the whole model saves, float32 [size]."""
        return self._cost

    def with_block(self) -> Tensor:
        """Parameters that removing all of each structure saves beside the `cost` of its decisions, [structures]."""
        return self._with_block

    def kept(self, mask: Tensor) -> int:
        """Decoder parameters that a hard mask [size] keeps."""
        return round(float(self._count(mask.detach().to(self.device))))

    def share(self, mask: Tensor) -> float:
        """Share of the decoder parameters that a hard mask [size] keeps, in (0, 1]."""
        return float(self.portion(mask.detach()))

    def portion(self, mask: Tensor) -> Tensor:
        """`share` as a scalar float64 tensor, differentiable in the mask."""
        return self._count(mask.to(self.device)) / self.total

    def loss(self, mask: Tensor, target: float) -> Tensor:
        """|log(p / p*)| of the share p that the mask keeps, scalar, differentiable (docs/method.md section 4)."""
        return (self.portion(mask) / target).log().abs().float()
