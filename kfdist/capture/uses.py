"""What is remembered of a block's use in a forward, until its output's gradient comes."""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfdist.capture.affine import Affine, Columns
from kfdist.capture.micro_batches import MicroBatch
from kfdist.capture.operations import Product
from kfdist.capture.passes import ForwardPass
from kfdist.capture.registry import Part
from kfdist.capture.saved_inputs import SavedInput, SaveLog
from kfdist.capture.stated import Stated
from kfdist.capture.visits import Scaling, Unit, Visit
from kfdist.errors import KfdistError
from kfdist.torch_internals import changes_in_place, product_edge, running_backward


@dataclass(frozen=True, eq=False)
class Use:
    """What is remembered of a block's use until its backward.

    Attributes:
        part: The block, its share of the product, and whether its bias was added, known when the forward is over.
        activation: What its weight was multiplied with; or what its node has of it once it has run, in its backward.
        version: The activation's, to notice changes.
        output_shape: Of the product, its own rows last.
        transposed: Whether gradients come with the last two dimensions exchanged.
        whole: Whether the block's share of the product is all of it.
        forward: Which forward it belongs to.
        generation: Of the capture.
        rerun_in: The backward that checkpointing repeats it in.
        columns: Of a block of units, how its gradients are made; None for other blocks.
        inside: Of a block of units, whether its layer is inside of one that may take examples along dim 1.
    """

    part: Part
    activation: Tensor | SavedInput
    version: int | None
    output_shape: tuple[int, ...]
    transposed: bool
    whole: bool
    forward: ForwardPass
    generation: int
    rerun_in: int
    columns: Columns | None = None
    inside: bool = False

    @property
    def name(self) -> str:
        """The block."""
        return self.part.block

    @property
    def is_there(self) -> bool:
        """Whether its activation is: its node doesn't unpack it where a backward asks for no gradient of the weight."""
        return isinstance(self.activation, Tensor) or self.activation.tensor is not None

    @property
    def given(self) -> Tensor:
        """The activation."""
        found = self.activation if isinstance(self.activation, Tensor) else self.activation.tensor
        assert found is not None, "it is there"
        return found

    def check_unchanged(self) -> None:
        """Checks that the layer's input is still what the layer saw.

        Raises:
            KfdistError: It was changed in place.
        """
        if isinstance(self.activation, Tensor) and self.version != changes_in_place(self.activation):
            raise KfdistError(
                f"the input of layer {self.name!r} was changed in place between its forward and its backward, so its "
                "statistics are lost (autocast had copied it, or torch itself would have refused); make that "
                "operation out of place"
            )

    def share(self, gradient: Tensor) -> Tensor:
        """Cuts the block's output gradient out of the product's, which may have come with its positions flattened.

        Of a block of units it has the entries along dim 0.
        """
        gradient = gradient.detach()
        if self.transposed:
            *others, rows, columns = self.output_shape
            gradient = gradient.reshape(*others, columns, rows).mT
        else:
            gradient = gradient.reshape(self.output_shape)
        if self.columns is not None:
            return self.columns.by_entries(gradient, turned=self._turned)
        return gradient if self.whole else gradient[..., self.part.rows]

    def visit(self, batch: MicroBatch, stated: Stated) -> Visit:
        """Returns what is measured of it in a micro-batch."""
        part, unit = self.part, Unit(batch, self.forward)
        visit = Visit(self.name, self.given, unit, stated, biased=part.biased, reach=part.reach, alone=part.alone)
        if self.columns is not None:
            visit.of_units = partial(self.columns.gradients, operand=self.given, turned=self._turned)
        return visit

    @property
    def _turned(self) -> bool:
        """Whether examples lie along dim 1 of the output."""
        return len(self.output_shape) > 2 and self.forward.is_turned(self.output_shape, inside=self.inside)


@dataclass(frozen=True)
class Held:
    """What backwards that keep their graph have made for a use so far: another one may add to it."""

    gradient: Tensor
    scaling: Scaling


def uses_of_product(
    parts: Iterable[Part],
    product: Product,
    output: Tensor,
    forward: ForwardPass,
    generation: int,
    saved: SaveLog | None,
) -> tuple[list[Use], GradientEdge]:
    """Returns the uses of blocks' weights in a product, and where the gradient of its output comes.

    Args:
        parts: The blocks' shares.
        product: The product.
        output: Its.
        forward: In which forward.
        generation: Of the capture.
        saved: What the product has saved; None where its input is wanted before its node runs.
    """
    edge, transposed = product_edge(output)
    shape, activation = tuple(output.shape), product.activation.detach()
    if product.from_left:  # y^T = x^T W^T
        shape, activation, transposed = (*shape[:-2], shape[-1], shape[-2]), activation.mT, not transposed
    elif saved is not None:
        activation = saved.input_of(edge.node, activation) or activation
    uses = [
        Use(
            part,
            activation,
            changes_in_place(product.activation),
            shape,
            transposed,
            product.operation.kind != "linear" or part.rows == slice(0, shape[-1]),
            forward,
            generation,
            running_backward(),
        )
        for part in parts
    ]
    return uses, edge


def uses_of_affine(
    columns: Iterable[Columns],
    affine: Affine,
    output: Tensor,
    forward: ForwardPass,
    generation: int,
    *,
    inside: Container[str],
) -> tuple[list[Use], GradientEdge]:
    """Returns the uses of blocks' scales and shifts in an operation, and where the gradient of its output comes."""
    edge, transposed = product_edge(output)
    uses = []
    for each in columns:
        operand = affine.operand if affine.operand is not None and each.needs_operand else output.new_empty(0)
        uses.append(
            Use(
                Part(each.block, slice(0), biased=True, alone=each.alone),
                operand.detach(),
                changes_in_place(operand),
                tuple(output.shape),
                transposed,
                True,
                forward,
                generation,
                running_backward(),
                each,
                each.block in inside,
            )
        )
    return uses, edge
