"""A service in simulated time: requests arrive, are routed, admitted, prefilled in chunks and decoded in batches.

Knows nothing about how a decode step works inside: the step executors price it.
"""

from clo_sim.serving.load import generate, lengths_of
from clo_sim.serving.metrics import ServiceResult, summarise_service
from clo_sim.serving.requests import Request, RequestTrace, read_requests
from clo_sim.serving.service import ServiceRun, ServiceSettings, serve
from clo_sim.serving.slo import Slo, parse_slo
from clo_sim.serving.worker import WorkerCosts, worker_costs

__all__ = [
    "Request",
    "RequestTrace",
    "ServiceResult",
    "ServiceRun",
    "ServiceSettings",
    "Slo",
    "WorkerCosts",
    "generate",
    "lengths_of",
    "parse_slo",
    "read_requests",
    "serve",
    "summarise_service",
    "worker_costs",
]
