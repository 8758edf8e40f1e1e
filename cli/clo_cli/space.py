"""`--vary FIELD=V1,V2` and `--vary FIELD=LOW..HIGH`: what an exploration may change. Knows nothing about trying it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clo.errors import CloError, SpecError

if TYPE_CHECKING:
    from clo.specs import Design
    from clo.specs.overrides import Overrides
    from clo_sim.scene import Scene
    from clo_sim.search import Range, Space


def space_from(vary: tuple[str, ...], scene: Scene, base: Design) -> Space:
    """`("design.tau=0.7,0.8", "workload.batch=1..64:log")` -> values and ranges by dotted field.

    A field without a root is a design's. Raises `CloError` naming the option, or the field, value and rule.
    """
    from clo_sim.explore import check_space

    space: dict[str, list[Any] | Range] = {}
    for text in vary:
        name, separator, values = text.partition("=")
        field = _dotted(name.strip())
        if not separator or not _exists(scene, field):
            near = _meant(name.strip())
            raise SpecError(
                f"--vary {text}: did you mean {near}?"
                if near
                else f"--vary {text}: expected FIELD=V1,V2 with FIELD one of design.*, workload.*, machine.*, model.*, "
                "profile.*, machine or model (fields: clo show designs clo, clo show machines h200)"
            )
        if field in space:
            raise SpecError(f"--vary {text}: {field} is varied twice: give all its values to one --vary")
        space[field] = _values(text, values)
    check_space(scene, space, base)
    return space


def check_conflicts(space: Space, overrides: Overrides, profile: str | None) -> None:
    """A machine or model that is varied as a whole would undo what was set on one. Raises `SpecError`."""
    for root, set_by_hand in (("machine", ("machine", "profile")), ("model", ("model",))):
        if root not in space:
            continue
        for other in set_by_hand:
            if overrides[other]:
                if other == root:
                    field = ".".join(next(iter(overrides[other])))
                    raise SpecError(
                        f"--vary {root}=...: each {root} comes with its own fields: vary {root}.{field} too, "
                        f"and drop --set {root}.*"
                    )
                raise SpecError(f"--vary {root}=...: each {root} comes with its own {other}: drop --set {other}.*")
        if profile is not None and root == "machine":
            raise SpecError("--vary machine=...: each machine comes with its own costs: drop --profile")


def _dotted(name: str) -> str:
    from clo_sim.variation import ROOTS

    return name if name.split(".")[0] in ROOTS else f"design.{name}"


def _meant(name: str) -> str:
    """The field of the workload that somebody means who left its root out, as `--context` and `--batch` have it."""
    from clo.specs import Workload

    return next((f"workload.{field}" for field in Workload.model_fields if f"{field}_".startswith(f"{name}_")), "")


def _exists(scene: Scene, field: str) -> bool:
    from clo_sim.variation import check_field, has_field

    try:
        check_field(scene, field, ())
    except CloError:
        return False
    return has_field(scene, field)


def _values(text: str, values: str) -> list[Any] | Range:
    from clo.specs.overrides import parse_value
    from clo_sim.search import Range

    low, dots, rest = values.partition("..")
    if dots:
        high, _, scale = rest.partition(":")
        ends = [parse_value(low), parse_value(high)]
        if scale not in ("", "log") or not all(type(end) in (int, float) for end in ends):
            raise SpecError(f"--vary {text}: expected FIELD=LOW..HIGH or FIELD=LOW..HIGH:log, with numbers")
        try:
            return Range(ends[0], ends[1], scale == "log")
        except SpecError as error:
            raise SpecError(f"--vary {text}: {error}") from None
    tried = [value.strip() for value in values.split(",")]
    if not all(tried):
        raise SpecError(f"--vary {text}: a value is missing (none stands for no value)")
    return [parse_value(value) for value in tried]
