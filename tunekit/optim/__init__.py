"""Optimizers and learning-rate schedules by name, averages of weights, and their states.

No torch here until an optimizer is built: a recipe is checked without it.
"""

from tunekit.optim.build import ParameterGroup as ParameterGroup
from tunekit.optim.build import RateKey as RateKey
from tunekit.optim.build import build_optimizer as build_optimizer
from tunekit.optim.build import check_optimizer as check_optimizer
from tunekit.optim.build import notes as notes
from tunekit.optim.build import peak_rate as peak_rate
from tunekit.optim.schedule import build_schedule as build_schedule
from tunekit.optim.schedule import rate_factor as rate_factor
from tunekit.optim.size import disk_bytes as disk_bytes
from tunekit.optim.size import saved_bytes as saved_bytes
from tunekit.optim.size import state_bytes as state_bytes
from tunekit.optim.state import has_stepped as has_stepped
from tunekit.optim.state import load_state_tensors as load_state_tensors
from tunekit.optim.state import state_tensors as state_tensors
