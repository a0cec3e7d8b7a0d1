"""torchvision beside a torch in which its compiled operators don't load, such as a CPU-only one.

torchvision's wheel is built against torch with CUDA. Beside another torch its library doesn't load, and the import
fails at `torch.library.register_fake("torchvision::nms")`, for want of an operator (seen with 0.28.0). Models, datasets
and transforms need none of its operators, so their schemas are enough; a call of one says that it isn't there.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from kfdist.errors import ConfigError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
"""Of the operators that torchvision registers shape functions for (its _meta_registrations.py)."""

_registered: list[torch.library.Library] = []
"""Operators live as long as their library."""


def import_torchvision() -> ModuleType:
    """Imports torchvision, with schemas in the place of operators that can't be loaded.

    Raises:
        ConfigError: It isn't installed.
    """
    try:
        spec = importlib.util.find_spec("torchvision")
    except ValueError:  # it is being imported
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError("torchvision isn't installed; install kfdist with its extra: pip install 'kfdist[vision]'")
    if not _registered and not _operators_load(Path(spec.origin).parent):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _registered.append(library)
    return importlib.import_module("torchvision")


def _operators_load(folder: Path) -> bool:
    for extension in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")
