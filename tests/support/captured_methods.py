"""The methods whose blocks are measured by capture, as opposed to those that take gradients alone."""

from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverters import INVERTERS

CAPTURED = [name for name, cls in INVERTERS.items() if not issubclass(cls, AbstractGradientInverter)]
OF_GRADIENTS = [name for name in INVERTERS if name not in CAPTURED]
