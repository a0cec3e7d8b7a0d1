"""Trains small models with the kfdist that is first on PYTHONPATH and records every number, for compare_commits.py.

    PYTHONPATH=TREE python benchmarks/compare_commits_probe.py TREE OUT

OUT gets {item: {key: value}} by torch.save. One item per method of the inverters' table, trained by one process: each
tensor and each scalar of all its jobs and results, decoded, and the parameters after the last step. One item per method
and lag, trained by four ranks: what the ranks hold at the end.

This file runs in trees of different ages. It uses names that stay, and asks `first_of` for those that move. Only the
functions under "Containers" know what a payload's bytes look like; they give the same keys for all layouts.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")

import safetensors.torch
import torch
import torch.distributed as dist  # noqa: TID251  # the ranks join by themselves
from torch import Tensor, nn

Numbers = dict[str, Any]
"""Tensors and JSON scalars by a key that no layout changes."""

RANKS = 4
STEPS = 14
PERIODS = {"factor_period": 2, "inverse_period": 4}
OF_RANKS = ("rs-kfac", "kfac-eigen", "ekfac", "b-kfac", "seng")
LAGS = (0, 5)
INVERTED_BY_RANKS = ("eva", "cg-fac")
"""Methods without jobs."""

_BRAND = {"rank": 4, "increment_rows": 8}
_SAMPLES = {"examples": 12, "columns": 4}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "rs-kfac": {"rank": 6},
    "sre-kfac": {"rank": 6},
    "b-kfac": _BRAND,
    "b-r-kfac": _BRAND,
    "b-kfac-c": _BRAND,
    "seng": _SAMPLES,
}
"""Sizes at which a small model shows what a method does: with the defaults nothing would be truncated."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "kfac relative": ("kfac", {"damping_rule": "relative"}),
    "rs-kfac relative": ("rs-kfac", {"rank": 6, "damping_rule": "relative"}),
    "b-kfac after": ("b-kfac", {**_BRAND, "truncate": "after"}),
    "cg-fac block": ("cg-fac", {"operator": "block"}),
    "seng implicit": ("seng", {**_SAMPLES, "form": "implicit"}),
    "two-level rs-kfac": ("two-level", {"inner": "rs-kfac", "inner_settings": {"rank": 6}}),
}
"""Further items: a name, and a method with settings that take another path through it."""


def first_of(*modules: str) -> Any:
    """Imports the first of several modules that this tree has.

    Raises:
        ModuleNotFoundError: It has none.
    """
    for module in modules:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):  # the module is there, what it imports isn't
                raise
    raise ModuleNotFoundError(f"this tree has none of {', '.join(modules)}")


# Containers ----------------------------------------------------------------------------------------------------------
# A layout's reader returns {"content": ..., SCALAR, "blocks": [{"name": ..., SCALAR, ROLE: {FIELD: value}}]}. A record
# is a role whose fields may stand under `tensors` and `static`, which `_flat` leaves out of the key.


def numbers_of(payload: bytes) -> tuple[str, Numbers]:
    """Decodes a job or a result.

    Returns:
        Its blocks' names, joined; and its numbers by BLOCK/ROLE/FIELD, those of all blocks by their name alone.
    """
    skeleton = json.loads(json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])["__metadata__"]["kfdist"])
    nested = _of_named(skeleton, safetensors.torch.load(payload)) if skeleton["format"] == 1 else _of_nested(payload)
    if nested["content"] not in ("job", "result"):
        raise ValueError(f"the payload is a {nested['content']!r}; a run of FixedLag(0) has jobs and results only")
    blocks = nested["blocks"]
    numbers = dict(_flat({key: value for key, value in nested.items() if key not in ("format", "blocks")}))
    for block in blocks:
        inner = {key: value for key, value in block.items() if key != "name"}
        numbers.update({f"{block['name']}/{key}": value for key, value in _flat(inner)})
    return "+".join(sorted(block["name"] for block in blocks)), numbers


def _of_named(skeleton: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The layout of format 1: JSON with a list of blocks, and tensors named INDEX/ROLE/FIELD."""
    for name, tensor in tensors.items():
        index, role, field = name.split("/", 2)
        skeleton["blocks"][int(index)].setdefault(role, {}).setdefault("tensors", {})[field] = tensor
    return skeleton


def _of_nested(payload: bytes) -> dict[str, Any]:
    """The layout from format 2 on: the container of all nested state, with records as {"kind", "fields"}."""
    tree = importlib.import_module("kfdist.wire.tree").unpack(payload)
    blocks = [
        {part: _of_record(value) if _is_record(value) else value for part, value in block.items() if value is not None}
        for block in tree["blocks"]
    ]
    return {**tree, "blocks": blocks}


def _is_record(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"kind", "fields"}


def _of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the fields of inner records dotted names, and their kinds the name of the field, as format 1 had them."""
    fields: dict[str, Any] = {}
    for name, value in record["fields"].items():
        if _is_record(value):
            inner = _of_record(value)
            fields[name] = inner["kind"]
            fields.update({f"{name}.{key}": each for key, each in inner["tensors"].items()})
        else:
            fields[name] = value
    return {"kind": record["kind"], "tensors": fields}


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, path if len(path) == 1 and key in ("tensors", "static") else (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flat(inner, (*path, str(index)))
    else:
        role, *fields = path
        yield "/".join([role, ".".join(fields)] if fields else [role]), value


@contextmanager
def recorded_link() -> Iterator[Numbers]:
    """Records what the local link is given and returns during the `with`, in any order.

    Keys begin with "job" or "result", the number of those before it, and the blocks' names.
    """
    link = importlib.import_module("kfdist.links.local").LocalLink
    submit, poll = link.submit, link.poll
    numbers: Numbers = {}
    seen: Counter[tuple[str, str]] = Counter()

    def record(what: str, payload: bytes) -> None:
        names, found = numbers_of(payload)
        number = seen[what, names]
        seen[what, names] += 1
        numbers.update({f"{what} {number} of {names}: {key}": value for key, value in found.items()})

    def recording_submit(self: Any, job: Any) -> None:
        record("job", job.payload)
        submit(self, job)

    def recording_poll(self: Any) -> list[Any]:
        results = poll(self)
        for result in results:
            record("result", result.payload)
        return results

    link.submit, link.poll = recording_submit, recording_poll
    try:
        yield numbers
    finally:
        link.submit, link.poll = submit, poll


# Training ------------------------------------------------------------------------------------------------------------


def make_model(method: str) -> nn.Module:
    """Makes a model that the method accepts."""
    torch.manual_seed(0)
    if method == "kfac-tridiagonal":
        chain = (nn.Linear(72, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
        return nn.Sequential(nn.Flatten(), *chain)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=1 if method == "two-level" else 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 20),
        nn.ReLU(),
        nn.Linear(20, 3, bias=False),
    )


def batch_of(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor, float]:
    """Returns images, labels and the rank's share of the step's examples; ranks have 3 to 6 examples."""
    sizes = [(3 + (each + step) % 4) if ranks > 1 else 12 + step % 3 for each in range(ranks)]
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(sizes[rank], 2, 6, 6, generator=generator)
    y = torch.randint(0, 3, (sizes[rank],), generator=generator)
    return x, y, sizes[rank] / sum(sizes)


def train(method: str, settings: Mapping[str, Any], *, lag: int, rank: int = 0, ranks: int = 1) -> nn.Module:
    """Trains for `STEPS` steps; with several ranks, in the default process group.

    Raises:
        RuntimeError: The parameters stayed what they were, or are not finite.
    """
    import kfdist

    table = importlib.import_module("kfdist.curvature.inverters").INVERTERS
    model = make_model(method)
    before = digest_of(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    preconditioner = kfdist.Preconditioner(
        model,
        table[method](**settings),
        damping=1e-2,
        ema_decay=0.9,
        kl_clip=1e-2,
        lr=0.05,
        adoption=kfdist.FixedLag(lag),
        seed=7,
        **PERIODS,
    )
    for step in range(STEPS):
        x, y, share = batch_of(step, rank, ranks)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for parameter in model.parameters() if ranks > 1 else ():
            parameter.grad.mul_(share)
            dist.all_reduce(parameter.grad)
        preconditioner.step()
        optimizer.step()
    preconditioner.close()
    finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    if not finite or digest_of(model.named_parameters()) == before:
        raise RuntimeError(f"{method} did not train: its parameters are {'unchanged' if finite else 'not finite'}")
    return model


def digest_of(named: Any) -> str:
    """Returns the SHA-256 of named tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def numbers_of_model(model: nn.Module) -> Numbers:
    """Returns the parameters, and one digest of them and one of the buffers."""
    numbers: Numbers = {f"parameter {name}": tensor.detach() for name, tensor in model.named_parameters()}
    numbers["parameter_sha256"] = digest_of(model.named_parameters())
    numbers["buffer_sha256"] = digest_of(model.named_buffers())
    return numbers


def alone(method: str, settings: Mapping[str, Any]) -> Numbers:
    """Trains in one process under FixedLag(0) and returns all numbers of the jobs, the results and the model.

    Raises:
        RuntimeError: The method should have jobs, and none was seen.
    """
    with recorded_link() as numbers:
        model = train(method, settings, lag=0)
    if not numbers and method not in INVERTED_BY_RANKS:
        raise RuntimeError(f"{method} trained, but no job was seen at the local link; look at `recorded_link`")
    return numbers | numbers_of_model(model)


def rank_main(rank: int, directory: str) -> None:
    """Trains every method of `OF_RANKS` at every lag, as one of `RANKS` ranks, and writes what it holds at the end."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    items = {
        f"{method}, {RANKS} ranks, FixedLag({lag})": numbers_of_model(
            train(method, SETTINGS.get(method, {}), lag=lag, rank=rank, ranks=RANKS)
        )
        for method in OF_RANKS
        for lag in LAGS
    }
    dist.destroy_process_group()
    torch.save(items, f"{directory}/{rank}")


def together() -> dict[str, Numbers]:
    """Runs the ranks and returns their items; parameters are those of rank 0, which all have.

    Raises:
        RuntimeError: A rank failed, or the ranks' parameters differ.
    """
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=rank_main, args=(rank, directory)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"the ranks ended with {[process.exitcode for process in processes]}")
        of_ranks = [torch.load(f"{directory}/{rank}") for rank in range(RANKS)]
    items = of_ranks[0]
    for name, numbers in items.items():
        held = [of_rank[name] for of_rank in of_ranks]
        if len({each["parameter_sha256"] for each in held}) > 1:
            raise RuntimeError(f"{name}: the ranks' parameters differ")
        numbers["buffer_sha256"] = " ".join(each["buffer_sha256"] for each in held)
    return items


def main() -> None:
    """Runs everything and writes it."""
    tree, out = Path(sys.argv[1]).resolve(), sys.argv[2]
    torch.set_num_threads(1)
    package = Path(str(importlib.import_module("kfdist").__file__)).resolve()
    if not package.is_relative_to(tree):
        raise SystemExit(f"kfdist is imported from {package}, not from {tree}; put {tree} first on PYTHONPATH")
    table = importlib.import_module("kfdist.curvature.inverters").INVERTERS
    cases = {name: (name, SETTINGS.get(name, {})) for name in table} | dict(VARIANTS)
    items = {name: alone(method, settings) for name, (method, settings) in cases.items()}
    torch.save(items | together(), out)


if __name__ == "__main__":
    main()
