"""What a graph needs of a step: it reads no number on the host, sends nothing there, and finds its tensors again.

On a device that holds nothing (torch's `meta`), and on a CPU; with kernels that read nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import EVERY, ONE_OF_EACH, WITH_INDEXER
from latent import indexer_design
from small import design, prompt, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from clo import presets
from clo.engine import make_layers as make_module
from clo.engine import words as words_module
from clo.engine.checks import check_device
from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile
from clo.engine.kernels import Kernels
from clo.engine.layers import DenseLayer, Layer, LayerShape, LinearLayer, StreamedLayer
from clo.engine.layers import shape as layer_shape
from clo.engine.make_layers import make_layers
from clo.engine.models.network import Network
from clo.engine.operations import Operations
from clo.engine.random_weights import random_prompt
from clo.engine.words import Words
from clo.errors import SpecError
from clo.plan import DecodePlan
from clo.schedule import Lane, record_step
from clo.schedule.ops import Stage
from clo.schedule.work import HostAction, Submit
from clo.specs import Design
from clo_kernels.layout import DeviceKV, PageTable, Resolved

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GRAPHS = [
    *[design(name) for name in presets.names("designs") if presets.load_design(name).sync == "graph"],
    design("streamed", sync="graph").with_fields(name="streamed, graph"),
    *[
        design("clo", transfer=transfer, resolve_on=on).with_fields(name=f"clo, {transfer}, {on}")
        for transfer in ("page_copies", "staged", "gpu_zero_copy")
        for on in ("gpu", "cpu")
    ],
    design("recall", sync="graph").with_fields(name="recall, graph"),
    design("staged", sync="graph").with_fields(name="staged, graph"),
    design("clo", pinned_head_fraction=0.5).with_fields(name="pinned"),
    *[design("clo", selector=one).with_fields(name=one) for one in ("page_mean", "key_4bit", "sign_hash")],
]
ON_GPU = [one for one in GRAPHS if one.transfer != "cpu_zero_copy"]
named = [pytest.param(one, id=one.name) for one in ON_GPU]


def silent_kernels(_: torch.device) -> Kernels:
    """Stand for Triton's: they write their outputs and read nothing on the host."""

    def hit_test(query: Any, anchor: Any, tau: Any, *, out: Any, **_: Any) -> None:
        out.copy_((tau > 0).expand_as(out))
        anchor.copy_(query)

    def score_pages(*_: Any, out: Any, **__: Any) -> None:
        out.zero_()

    def select_pages(scores: Any, candidates: Any, missed: Any, selection: Any) -> None:
        selection.copy_(torch.arange(1, selection.shape[2] + 1, device=selection.device).expand_as(selection))

    def resolve_pages(chosen: Any, missed: Any, table: Any, *, replace: bool, out: Any) -> None:
        out.slots.copy_(chosen - 1)
        for one in (out.fetch_pages, out.fetch_slots, out.num_fetched):
            one.zero_()

    def gather_pages(host_pages: Any, slots: Any, fetch: Any, *, num_programs: int) -> None:
        slots.add_(0)

    def attention(query: Any, kv: Any, selected: Any, lengths: Any, *, out: Any, **_: Any) -> Any:
        return out.copy_(query[..., : out.shape[-1]])

    def append_kv(key: Any, value: Any, lengths: Any, kv: Any, host_pages: Any, index: Any, **_: Any) -> None:
        kv.window.add_(0)

    return Kernels(hit_test, score_pages, select_pages, resolve_pages, gather_pages, attention, append_kv)


class NothingRead(TorchDispatchMode):
    """Refuses whatever makes the host wait for the device, or its memory depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__.rstrip("_"), kwargs or {}
        self.done.append(f"{func} {tree_map(place, (args, kwargs))}")
        assert name not in self.READS, f"{func} reads a value on the host"
        if name in ("index", "index_put"):
            assert not any(one is not None and one.dtype == torch.bool for one in args[1]), f"{func} with a mask"
        if name == "copy" and args[0].device != args[1].device:
            waits = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            assert waits, f"{func} from {args[1].device} to {args[0].device} makes the host wait"
            assert args[0].is_contiguous(), f"{func} needs a buffer between the two memories"
            assert args[1].is_contiguous(), f"{func} needs a buffer between the two memories"
            return args[0]
        if name == "_to_copy" and kwargs.get("device") is not None:
            assert kwargs["device"] == args[0].device, f"{func} from {args[0].device} to {kwargs['device']}"
        return func(*args, **kwargs)


def place(value: Any) -> Any:
    """What a recorded call holds of an argument: constants, and of tensors which part of their memory."""
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype


def operations_of(network: Network, chosen: Design, monkeypatch: pytest.MonkeyPatch) -> tuple[Operations, DecodePlan]:
    monkeypatch.setattr(layer_shape, "kernels_for", silent_kernels)
    with Decoder(network, chosen, max_new_tokens=8) as decoder:
        plan = decoder.make_plan([80, 80])
        layers = make_layers(network, plan, HeadProfile(), 88)
    operations = Operations(network, plan, layers, ThreadPoolExecutor(1))
    operations.take([80, 80])
    return operations, plan


def record(operations: Operations, plan: DecodePlan) -> None:
    """What a stream runs in a step that is recorded; transfer threads' work and what they submit is not."""
    operations.embed()
    nodes = record_step(plan).nodes
    by_threads = {number for number, node in enumerate(nodes) if node.lane is Lane.POOL}
    for node in nodes:
        if node.lane in (Lane.LAUNCH, Lane.POOL) or isinstance(node.op.work, HostAction | Submit):
            continue
        if node.lane is Lane.H2D and any(wait.node in by_threads for wait in node.after):
            continue
        operations.run(node.op)


def assert_nothing_is_read(operations: Operations, plan: DecodePlan) -> None:
    """On the host, in six steps that all do the same."""
    steps = []
    for _ in range(6):  # in some of which a page leaves the window
        operations.begin(torch.zeros(2, dtype=torch.int64, device="meta"))
        with torch.inference_mode(), NothingRead() as read:
            record(operations, plan)
        steps.append(read.done)
    assert len(steps[0]) > 100
    assert all(step == steps[0] for step in steps)


@pytest.fixture
def device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is `meta`: another memory than the CPU's, and one that holds nothing to be read."""
    zeros, empty = torch.zeros, torch.empty

    def unpinned(make: Any) -> Any:
        return lambda *sizes, pin_memory=False, **options: make(*sizes, **options)

    monkeypatch.setattr(torch, "zeros", unpinned(zeros))
    monkeypatch.setattr(torch, "empty", unpinned(empty))
    for module in (make_module, layer_shape, words_module):
        monkeypatch.setattr(module, "two_memories", lambda device: device.type != "cpu")


@pytest.mark.usefixtures("device_of_its_own")
@pytest.mark.parametrize("chosen", named)
def test_a_recorded_step_reads_nothing_on_the_host(chosen: Design, monkeypatch: pytest.MonkeyPatch) -> None:
    operations, plan = operations_of(Network(small_model().to("meta")), chosen, monkeypatch)
    assert all(layer.shape.recorded for layer in operations.layers)
    assert_nothing_is_read(operations, plan)


@pytest.mark.usefixtures("device_of_its_own")
@pytest.mark.parametrize("kind", EVERY)
def test_nor_of_models_with_experts_windows_and_states(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of bf16 in one product: in others torch loops over them on the host."""
    network = Network(EVERY[kind](dtype=torch.bfloat16).to("meta"))
    operations, plan = operations_of(network, design("clo"), monkeypatch)
    assert not network.host_sees_experts
    linear = network.spec.linear
    for layer in (one for one in operations.layers if isinstance(one, LinearLayer)):
        assert linear is not None
        sizes = (linear.conv_width, linear.conv_tokens), (linear.num_value_heads, linear.key_dim, linear.value_dim)
        for sequence in range(2):
            layer.load(sequence, *(torch.zeros(size, device="meta") for size in sizes))
    assert_nothing_is_read(operations, plan)


@pytest.mark.usefixtures("device_of_its_own")
@pytest.mark.parametrize("kind", WITH_INDEXER)
@pytest.mark.parametrize("name", ["clo", "resolve", "lru-cpu", "recall", "resident-sparse"])
def test_nor_where_the_model_s_own_indexer_chooses(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(WITH_INDEXER[kind](dtype=torch.bfloat16).to("meta"))
    chosen = indexer_design(name, network, sync="graph", transfer="gpu_zero_copy")
    assert_nothing_is_read(*operations_of(network, chosen, monkeypatch))


@pytest.mark.parametrize("chosen", named)
def test_a_recorded_step_finds_its_tensors_where_they_were(chosen: Design, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step reads that another has written lies where it lay."""
    operations, plan = operations_of(Network(small_model()), chosen, monkeypatch)
    assert len(lasting(operations, plan)) > 10


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("name", ["clo", "resolve", "resident"])
def test_so_do_those_of_other_kinds(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operations, plan = operations_of(Network(EVERY[kind]()), design(name), monkeypatch)
    network = operations.network
    with_prompts(operations)
    states = [path for path in lasting(operations, plan) if path.endswith("states")]
    assert len(states) == (0 if network.spec.linear is None else len(network.spec.linear.layers))


@pytest.mark.parametrize("kind", WITH_INDEXER)
@pytest.mark.parametrize("name", ["clo", "resolve"])
def test_and_of_models_with_an_indexer(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(WITH_INDEXER[kind]())
    operations, plan = operations_of(network, indexer_design(name, network, sync="graph"), monkeypatch)
    assert len(lasting(operations, plan)) > 10


def lasting(operations: Operations, plan: DecodePlan) -> dict[str, int]:
    """The tensors that outlive a step, which lie in each of three steps where they lay."""
    before: dict[str, int] = {}
    for _ in range(3):
        operations.begin(torch.zeros(2, dtype=torch.int64))
        with torch.inference_mode():
            record(operations, plan)
        now = addresses(operations)
        assert now == (before or now)
        before = now
    return before


def with_prompts(operations: Operations) -> Operations:
    """Layers with linear attention have no states before."""
    for sequence in range(2):
        random_prompt(operations.network, 80).load_into(operations.layers, sequence)
    return operations


def addresses(operations: Operations) -> dict[str, int]:
    """Of every tensor that outlives a step."""
    found = {"lengths": operations.lengths.data_ptr(), "tokens": operations._tokens.data_ptr()}
    for number, layer in enumerate(operations.layers):
        for path, tensor in tensors(layer, f"layer {number}"):
            found[path] = tensor.data_ptr()
    return found


def tensors(thing: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All in the attributes of a layer, and in what they hold; but for the newest key and value, which are a step's."""
    if isinstance(thing, torch.Tensor):
        yield path, thing
    elif isinstance(thing, LinearLayer):
        yield from zip((f"{path}.conv", f"{path}.states"), thing.kept, strict=True)
    elif isinstance(thing, dict):
        for name, part in thing.items():
            yield from tensors(part, f"{path}.{name}")
    elif isinstance(thing, tuple) and not path.endswith("._new"):
        for number, part in enumerate(thing):
            yield from tensors(part, f"{path}.{number}")
    elif isinstance(thing, Layer | DeviceKV | PageTable | Resolved | Words):
        names = getattr(type(thing), "__slots__", None) or vars(thing)
        for name in names:
            yield from tensors(getattr(thing, name), f"{path}.{name}")


class TestTheSameAnswers:
    """What CUDA does differently gives what the other way gives."""

    def test_staging_buffers_that_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def decoded() -> torch.Tensor:
            chosen = design("clo", budget_pages=3, transfer="staged", sync="events")
            with Decoder(small_model(), chosen, max_new_tokens=9) as decoder:
                rows = [decoder.prefill([prompt(80), prompt(60, 1)])]
                rows += [decoder.step(torch.tensor([token, 7])).clone() for token in range(9)]
            return torch.stack(rows)

        expected, empty = decoded(), torch.empty
        monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
        monkeypatch.setattr("clo.engine.staging.two_memories", lambda _: True)
        assert torch.equal(decoded(), expected)

    @pytest.mark.parametrize("compiled_for", [[], ["90"]], ids=["interpreted", "compiled"])
    def test_with_triton_s_kernels(self, compiled_for: list[str]) -> None:
        if compiled_for and torch.cuda.is_available():
            pytest.skip("kernels run on the GPU")
        script = Path(__file__).with_name("kernel_steps.py")
        environment = os.environ | {
            "TRITON_INTERPRET": "0" if compiled_for else "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, str(script), *compiled_for]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert float(done.stdout) < 1e-4

    @pytest.mark.parametrize("value_dim", [None, 8])
    @pytest.mark.parametrize("kind", [DenseLayer, StreamedLayer])
    def test_a_dense_layer_by_the_kernel(self, kind: type[DenseLayer], value_dim: int | None) -> None:
        torch.manual_seed(0)
        heads = 2 if value_dim is None else 1
        shape = {"batch": 2, "num_query_heads": 6, "num_kv_heads": heads, "head_dim": 16, "max_tokens": 40}
        rest = {"dtype": torch.float32, "device": CPU, "scale": 0.25, "value_dim": value_dim}
        plain = kind(LayerShape(**shape, **rest))
        recorded = kind(LayerShape(**shape, **rest, recorded=True))
        recorded.by_kernel = True
        widths = (16, 16) if value_dim is None else (value_dim, 16 - value_dim)
        prompts = [[torch.randn(heads, tokens, width) for width in widths] for tokens in (30, 17)]
        for layer in (plain, recorded):
            for sequence, (keys, values) in enumerate(prompts):
                layer.load(sequence, keys, values)
        lengths = [30, 17]
        for _ in range(5):
            lengths = [length + 1 for length in lengths]
            new, query = [torch.randn(2, heads, 16) for _ in range(heads)], torch.randn(2, 6, 16)
            found = [decoded(layer, new, query, lengths) for layer in (plain, recorded)]
            torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def decoded(layer: DenseLayer, new: list[torch.Tensor], query: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """One step of a layer, of `new` keys and values or of what is both."""
    device_lengths = torch.tensor(lengths, dtype=torch.int32)
    layer.begin(lengths)
    layer.append(new[0], new[1] if len(new) > 1 else None, device_lengths)
    if isinstance(layer, StreamedLayer):
        layer.copy(Stage.DEMAND, 4)
    return layer.attend(query, device_lengths)


class TestRefusals:
    @pytest.mark.parametrize(
        ("chosen", "heads", "message"),
        [
            (design("clo-v2"), HeadProfile(), r"design\.transfer = cpu_zero_copy: .* simulated only"),
            (design("clo", selector="exact"), HeadProfile(), r"design\.selector = exact .* or sync = events"),
            (design("clo"), HeadProfile(refresh_rate=0.5), r"heads\.refresh_rate: .*design\.sync = events"),
        ],
    )
    def test_what_cuda_cannot_do_is_refused(self, chosen: Design, heads: HeadProfile, message: str) -> None:
        check_device(chosen, heads, CPU)
        with pytest.raises(SpecError, match=message):
            check_device(chosen, heads, CUDA)

    @pytest.mark.parametrize("name", ["clo", "lru-cpu", "recall", "staged", "streamed", "resident-sparse"])
    def test_others_are_not(self, name: str) -> None:
        check_device(design(name), HeadProfile(), CUDA)
