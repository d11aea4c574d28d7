"""The table of backends: what each can run, whether it is here, and which one `auto` takes."""

from entropy_attn.backend.choice import Call, Choice, choose
from entropy_attn.backend.crossover import compare_with_dense
from entropy_attn.backend.table import BACKENDS, Availability, Backend, backends

__all__ = [
    "BACKENDS",
    "Availability",
    "Backend",
    "Call",
    "Choice",
    "backends",
    "choose",
    "compare_with_dense",
]
