"""Results, points, timelines, choices and answers for tests of figures, and the words in a figure."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.text import Text

from clo.choices import Alternative, Choices
from clo.results import Result, Roofline
from clo.schedule.machine import Cause, Lane, Part
from clo.specs import Design, Workload
from clo.timeline import Span, Timeline
from clo_plots.answers import Answer, Answers
from clo_plots.pareto import DesignPoint

TPOT_MS = {"clo": 20, "clo-v2": 75, "resolve": 55, "lru-cpu": 70, "recall": 500, "staged": 1250, "streamed": 5000}


KV_GB = {"clo": 121, "clo-v2": 59, "resolve": 121, "lru-cpu": 120, "recall": 121, "staged": 42, "streamed": 40}


_PLAIN_FIELDS = (
    *("tpot_p50_s", "tpot_p99_s", "tokens_per_s", "hit_rate", "reuse_rate", "overlap", "h2d_bytes_per_step"),
    *("d2h_bytes_per_step", "h2d_utilisation", "hbm_bytes_per_step", "cpu_launch_s", "cpu_threads_s", "device_bytes"),
    *("kv_device_bytes", "host_bytes", "measured_share"),
)


def make_result(name: str, tpot_s: float) -> Result:
    busy = {"model": 0.005, "attention": 0.011, "selection": 0.001}
    stalls = dict.fromkeys((cause.value for cause in Cause), 0.0)
    stalls["on-demand transfer"] = tpot_s - 0.0185
    stalls["sync"] = 0.0005
    return Result(
        executor="simpy",
        model="llama-3-8b",
        machine="h200",
        profile="h200",
        design=Design(name=name),
        workload=Workload(),
        tpot_s=tpot_s,
        busy_s=busy,
        stall_s=stalls,
        contention_s=0.001,
        roofline=Roofline(hbm_bytes=1, hbm_s=1, h2d_bytes=1, h2d_s=1, compute_s=1, seconds=1),
        lane_busy_s={},
        ops={},
        memory={},
        source_shares={},
        **dict.fromkeys(("num_pages", "budget_pages", "slot_pages"), 1),
        **dict.fromkeys(_PLAIN_FIELDS, 0.0),
    )


def make_results() -> list[Result]:
    return [make_result(name, ms / 1e3) for name, ms in TPOT_MS.items()]


def make_timeline(name: str, layer_s: float, num_layers: int = 32) -> Timeline:
    """Each layer: selection, a stall for half of the layer, attention, then the model; transfers on a second stream."""

    def span(lane: Lane, part: Part, layer: int, begin: float, end: float, waited: float = 0.0) -> Span:
        return Span(
            lane=lane.value,
            name=part.value,
            layer=layer,
            part=part.value,
            start_s=(layer + begin) * layer_s,
            end_s=(layer + end) * layer_s,
            waits=((Cause.DEMAND.value, waited * layer_s),) if waited else (),
        )

    spans = []
    for layer in range(num_layers):
        spans.append(span(Lane.MAIN, Part.SELECTION, layer, 0.0, 0.1))
        spans.append(span(Lane.MAIN, Part.ATTENTION, layer, 0.6, 0.8, waited=0.5))
        spans.append(span(Lane.MAIN, Part.MODEL, layer, 0.8, 1.0))
        spans.append(span(Lane.PREFETCH, Part.TRANSFER, layer, 0.1, 0.6))
    lanes = (Lane.LAUNCH.value, Lane.MAIN.value, Lane.PREFETCH.value)
    return Timeline(title=name, spans=tuple(spans), lanes=lanes)


def make_timelines() -> list[Timeline]:
    return [make_timeline("clo", 0.6e-3), make_timeline("resolve", 1.7e-3), make_timeline("recall", 15e-3)]


def make_points() -> list[DesignPoint]:
    named = [
        DesignPoint(name=name, kv_device_bytes=KV_GB[name] * 1e9, tpot_s=ms / 1e3, named=True)
        for name, ms in TPOT_MS.items()
    ]
    swept = [
        DesignPoint(name=f"{gb}/{step}", kv_device_bytes=gb * 1e9, tpot_s=0.024 * (121 / gb) * 1.5**step)
        for gb in range(45, 121, 15)
        for step in range(8)
    ]
    return swept + named


def make_choices() -> Choices:
    changed = (
        ("cache", "head_reuse", "lru", 0.0275),
        ("prefetch_depth", "1", "0", 0.021),
        ("prefetch_depth", "1", "2", 0.0195),
        ("cache", "head_reuse", "none", 1.35),
        ("transfer", "gpu_zero_copy", "cpu_zero_copy", 0.075),
    )
    ran = [Alternative(field=f, chosen=c, value=v, tpot_s=s) for f, c, v, s in changed]
    failed = Alternative(field="slot_budgets", chosen="2", value="8", tpot_s=None, note="needs 300 GB\nof 121 GB " * 9)
    return Choices(best_name="clo", best_tpot_s=0.020, alternatives=(*ran, failed))


def make_answers(*names: str) -> Answers:
    shares = {"resolve 1x": 0.42, "clo 1x tau=0.7": 0.13, "clo 1x tau=0.8": 0.21, "clo 1x tau=0.9": 0.3, "staged": 1.0}
    points = [
        Answer(name=name, share=share, delta_nll=0.05 - 0.1 * share, delta_nll_se=0.01)
        for name, share in shares.items()
        if not names or name in names
    ]
    return Answers(title="smollm2-135m, 4096 tokens, 12 texts (topics)", points=tuple(points))


def texts_of(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]
