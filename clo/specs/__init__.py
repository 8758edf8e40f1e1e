"""Frozen, validated records: a model, a machine, a design, a workload. They know nothing about time or tensors."""

from clo.specs.base import Spec
from clo.specs.design import (
    Attend,
    Cache,
    Design,
    GqaFold,
    OnMiss,
    PageCoding,
    PrefetchQuery,
    ResolveOn,
    Selector,
    Sync,
    Transfer,
)
from clo.specs.experts import ExpertsSpec
from clo.specs.hf_config import model_from_hf_config
from clo.specs.indexer import IndexerSpec
from clo.specs.latent import LatentSpec
from clo.specs.linear import LinearSpec
from clo.specs.machine import GpuSpec, HostSpec, LinkSpec, MachineSpec
from clo.specs.model import ModelSpec, Projection
from clo.specs.workload import Workload

__all__ = [
    "Attend",
    "Cache",
    "Design",
    "ExpertsSpec",
    "GpuSpec",
    "GqaFold",
    "HostSpec",
    "IndexerSpec",
    "LatentSpec",
    "LinearSpec",
    "LinkSpec",
    "MachineSpec",
    "ModelSpec",
    "OnMiss",
    "PageCoding",
    "PrefetchQuery",
    "Projection",
    "ResolveOn",
    "Selector",
    "Spec",
    "Sync",
    "Transfer",
    "Workload",
    "model_from_hf_config",
]
