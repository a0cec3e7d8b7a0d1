"""Whether some layers of a model run one after another, so that each depends on the rest through its neighbours only.

That can be read off a tree of `nn.Sequential`. A forward written by hand could do anything, so there the user vouches
for the order.
"""

from collections.abc import Sequence

from torch import nn

from kfdist.torch_internals import children_by_name
from kfdist.types import BlockName

_KEEP_SHAPE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,  # and ReLU6, its subclass
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.RReLU,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
    nn.Dropout,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.Identity,
)
"""What may stand between two layers of a chain: each output depends on the same unit's input alone, and there is
nothing to learn."""


def chain_refusal(model: nn.Module, names: Sequence[BlockName], *, assume_chain: bool = False) -> str:
    """Says why the layers aren't a chain, and what to do; empty if they are.

    The smallest module that holds all of them must be a tree of `nn.Sequential`, with nothing between the layers but
    elementwise modules without parameters. What comes before the first and after the last doesn't matter.

    Args:
        model: The model, without wrappers such as DistributedDataParallel.
        names: Dotted names of the blocks, in the model's order.
        assume_chain: The user vouches that every other module that holds layers runs its children in the order in which
            they are registered; what stands between the layers is looked at all the same.

    Raises:
        ValueError: The model has no module of one of these names.
    """
    if not names:
        return "a chain needs at least one layer, none is given; name the chain's Linear layers"
    modules = {name: _submodule(model, name) for name in names}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            return f"a chain couples Linear layers only, {name!r} is a {type(module).__name__}; give it another method"
    if len(names) == 1:
        return ""
    common = _common_prefix(names)
    found = _leaves(_submodule(model, common), common, frozenset(names), assume_chain)
    if isinstance(found, str):
        return found
    order = [name for name, _ in found if name in modules]
    if order != list(names):
        return (
            f"the layers run in the order {', '.join(order)}, the chain is {', '.join(names)}; a layer may be there "
            "once, and in this order"
        )
    names_found = [name for name, _ in found]
    between = found[names_found.index(names[0]) : names_found.index(names[-1])]
    shared = {id(module) for module in modules.values()}
    for name, module in between:
        if name in modules:
            continue
        if id(module) in shared:
            return f"the layer {name!r} is used twice, so it has no place in a chain; give it another method"
        if not isinstance(module, _KEEP_SHAPE) or next(module.parameters(), None) is not None:
            return (
                f"{name!r} ({type(module).__name__}) stands between the layers of the chain, where only activations, "
                "dropout and identities may; put it outside, or match fewer layers, or give them `kfac`"
            )
    return ""


def _leaves(
    module: nn.Module, name: str, wanted: frozenset[BlockName], assume_chain: bool
) -> list[tuple[str, nn.Module]] | str:
    """Lists the modules under one that holds wanted layers, in the order in which they run; or says why it can't."""
    if not (_is_sequential(module) or assume_chain):
        return (
            f"{name or 'the model'!r} ({type(module).__name__}) has a forward of its own, so nobody can see that its "
            "layers run one after another; use nn.Sequential, or vouch for it with assume_chain = true"
        )
    found: list[tuple[str, nn.Module]] = []
    for child_name, child in children_by_name(module).items():
        full = f"{name}.{child_name}" if name else child_name
        if child is None:
            continue
        if any(each.startswith(f"{full}.") for each in wanted) or _is_sequential(child):
            inner = _leaves(child, full, wanted, assume_chain)
            if isinstance(inner, str):
                return inner
            found += inner
        else:
            found.append((full, child))
    return found


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no module {name!r}: {error}") from error


def _common_prefix(names: Sequence[str]) -> str:
    """Returns the name of the smallest module that holds all of these; empty for the model itself."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
