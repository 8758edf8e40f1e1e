"""`clo evaluate`: how good a real model's answers stay under designs. Knows nothing about how that is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo.errors import SpecError
from clo.files import write_json
from clo_cli.options import check_outputs, check_seed, design_from, device_option, names_from, overrides_from

if TYPE_CHECKING:
    from clo.specs import Design

    Fits = Callable[[Design], bool]


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="smollm2-135m, a model folder or a hub name.")
@device_option
@click.option("--designs", default="resident,resolve,clo", show_default=True, help="Presets or TOML files.")
@click.option("--taus", help="Try designs that reuse heads at each of these thresholds: 0.7,0.8,0.9.")
@click.option("--pools", help="Try designs that keep pages at each of these cache sizes, in budgets: 1,2,4.")
@click.option("--vary", "varied", multiple=True, metavar="FIELD=A,B", help="Try designs at each value of any field.")
@click.option("--controls", metavar="DESIGN", help="Add what this one must beat: a clock, and sinks and window only.")
@click.option("--against", help="Also compare with this one of the designs, text by text.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change a field: design.slot_budgets=1.")
@click.option("--context", default="1024", show_default=True, help="Tokens of each prompt; of several: 1024,2048.")
@click.option("--texts", default=4, show_default=True, help="Places in the text to decode from.")
@click.option("--tokens", default=64, show_default=True, help="Tokens decoded at each place, fed and generated.")
@click.option("--passkeys", default=10, show_default=True, help="Passkeys hidden at evenly spread depths.")
@click.option("--text", default="topics", show_default=True, help="topics or docstrings (of this Python), or a file.")
@click.option(
    "--split",
    default="report",
    show_default=True,
    type=click.Choice(["tune", "report", "all"]),
    help="The part of the text that is read: the first 40%, the rest, or all.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses places and keys.")
@click.option(
    "--trace", "trace_path", help="Trace of the model that says what its heads need.  [default: the shipped one]"
)
@click.option("--out", type=click.Path(path_type=Path), help="Write settings and records as JSON.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw answers against bytes moved: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
def evaluate(**options: Any) -> None:
    """Decode held-out text under designs and compare with full attention.

    Every decoded token goes through the design: text that is fed (perplexity), text that is generated, and the question
    for a hidden passkey. Standard errors are over texts.

    \b
    clo evaluate --designs resident,resolve,clo --context 1024
    clo evaluate --designs resolve,clo --taus 0.6,0.8 --out answers.json
    clo evaluate --designs clo --vary dense_layers=0,1,2 --split tune
    clo plot answers.json --out answers.png

    --device cuda decodes on a GPU, in bfloat16; it has not yet run on one.
    """
    check_seed(options["seed"])
    variants = _variants(options)
    options["contexts"] = _contexts(options)
    check_outputs(options["out"], figure=options["figure"])
    answers = _evaluate(variants, options)
    if options["out"] is not None:
        write_json(options["out"], answers)
    if options["figure"] is not None:
        _draw(answers, options["figure"])
    if options["as_json"]:
        click.echo(json.dumps(answers["answers"], indent=1))
    else:
        from clo_cli.answers_table import print_answers

        print_answers(answers["answers"], options["against"])


def _draw(answers: dict[str, Any], path: Path) -> None:
    from clo_plots import parse_answers, plot_answers, save_figure

    save_figure(plot_answers(parse_answers(answers, where="clo evaluate")), path)


def _variants(options: dict[str, Any]) -> list[Design]:
    """Every design at every value asked for. Raises `SpecError`."""
    overrides = overrides_from(options["settings"], ("design",))
    variants = [design_from(name, overrides) for name in names_from("--designs", options["designs"])]
    if options["pools"] is not None:
        pools = _numbers("--pools", options["pools"])
        keeps = _fitting("--pools", "keeps pages", variants, lambda design: design.cache in ("lru", "head_reuse"))
        variants = _spread(variants, keeps, "slot_budgets", pools, "{}x")
    if options["taus"] is not None:
        taus = _numbers("--taus", options["taus"])
        reuses = _fitting("--taus", "reuses heads", variants, lambda design: design.gated)
        variants = _spread(variants, reuses, "tau", taus, "tau={}")
    for given in options["varied"]:
        field, _, values = given.removeprefix("design.").partition("=")
        if not values:
            raise SpecError(f"--vary = {given!r}: FIELD=A,B is expected")
        selects = _fitting("--vary", "selects pages", variants, lambda design: design.selects)
        variants = _spread(variants, selects, field, values.split(","), f"{field}={{}}")
    for option in ("against", "controls"):
        chosen = options[option]
        if chosen is not None and chosen not in [design.name for design in variants]:
            known = ", ".join(design.name for design in variants)
            raise SpecError(f"--{option} = {chosen!r}: none of the designs ({known})")
    gated = [design.name for design in variants if design.cache == "head_reuse"]
    if options["controls"] is not None and options["controls"] not in gated:
        raise SpecError(f"--controls = {options['controls']!r}: it reuses no heads, which is what they are to compare")
    return variants


def _fitting(option: str, does: str, designs: list[Design], fits: Fits) -> Fits:
    """`fits`; raises `SpecError` where an option would change nothing."""
    if not any(map(fits, designs)):
        raise SpecError(f"{option}: none of the designs ({', '.join(design.name for design in designs)}) {does}")
    return fits


def _numbers(option: str, given: str) -> list[float]:
    try:
        return [float(value) for value in given.split(",")]
    except ValueError:
        raise SpecError(f"{option} = {given!r}: numbers separated by commas are expected") from None


def _contexts(options: dict[str, Any]) -> list[int]:
    given = options["context"]
    try:
        contexts = list(dict.fromkeys(int(value) for value in given.split(",")))
    except ValueError:
        raise SpecError(f"--context = {given!r}: whole numbers separated by commas are expected") from None
    if len(contexts) > 1 and options["figure"] is not None:
        raise SpecError(f"--figure: shows one context, --context = {given} names {len(contexts)}")
    return contexts


def _spread(designs: list[Design], fits: Fits, field: str, values: Sequence[float | str], mark: str) -> list[Design]:
    """Those that fit at each value of a field, named by `mark` with the value in it; the others as they are."""
    tried: list[Design] = []
    for design in designs:
        if not fits(design):
            tried.append(design)
            continue
        others = {"tau": {"target_hit_rate": None}, "slot_budgets": {"slot_pages": None}}.get(field, {})
        for value in values:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            name = f"{design.name} {mark}".replace("{}", shown)
            tried.append(design.with_fields(**others, **{field: value}, name=name))
    return tried


def _evaluate(designs: list[Design], options: dict[str, Any]) -> dict[str, Any]:
    from clo_cli.models import heads_from, load_for_decoding, need_engine

    need_engine("decoding")
    from clo.engine.answers.controls import Contender, controls_of
    from clo.engine.answers.evaluate import evaluate as run
    from clo.engine.answers.quality import compared
    from clo.engine.answers.tasks import EvaluationSettings, check_text
    from clo.engine.models.network import Network
    from clo.engine.texts import Split
    from clo.engine.versions import package_versions
    from clo_cli.bars import phases

    by_context = [
        EvaluationSettings(
            context_tokens=context,
            num_texts=options["texts"],
            decoded_tokens=options["tokens"],
            num_passkeys=options["passkeys"],
            split=Split(options["split"]),
            seed=options["seed"],
        )
        for context in options["contexts"]
    ]
    words = _text(options["text"])
    model, tokenizer = load_for_decoding(options["model"], options["device"])
    network = Network(model)
    contenders = [
        Contender(name=design.name, design=design, heads=heads_from(design, model, options["trace_path"]))
        for design in designs
    ]
    for contender in [one for one in contenders if one.name == options["controls"]]:
        contenders += controls_of(contender, network.spec)
    for settings in by_context:
        check_text(tokenizer, words, settings)
    records: list[dict[str, Any]] = []
    with phases() as progress:
        # the longest first: what does not fit is refused before the others are decoded
        for settings in sorted(by_context, key=lambda one: -one.context_tokens):
            found = run(network, tokenizer, words, contenders, settings, progress)
            asked = [quality.as_record() for quality in found]
            records = (compared(asked, options["against"]) if options["against"] is not None else asked) + records
    about = by_context[0].as_record()
    if len(by_context) > 1:
        about["context_tokens"] = options["contexts"]
    return {
        "evaluation": {"model": options["model"], "device": options["device"], "text": options["text"], **about},
        "versions": package_versions(),
        "designs": {contender.name: contender.design.model_dump(mode="json") for contender in contenders},
        "answers": records,
    }


def _text(given: str) -> str:
    from clo.engine.texts import TEXTS
    from clo_cli.record import read_text

    return TEXTS[given]() if given in TEXTS else read_text(Path(given))[0]
