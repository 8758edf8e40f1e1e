"""The base of every specification: frozen, closed to unknown fields, one-line errors. Knows no field of its own."""

from __future__ import annotations

import difflib
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from clo.errors import SpecError


class Spec(BaseModel):
    """A frozen record. `parse` and `with_fields` raise `SpecError` naming the field, the value and the rule."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python, and so pydantic, takes True for 1
        if isinstance(value, bool) and _wants_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must be a number, not true or false")
        return value

    @classmethod
    def parse(cls, data: dict[str, Any], *, where: str = "") -> Self:
        """Validate plain data; `where` (a file, an option) is put before the message."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(_prefix(where) + explain(cls, error)) from None

    @classmethod
    def check_value(cls, field: str, value: Any) -> None:
        """Whether a field takes a value, whatever the others are. Raises `SpecError` as `parse`."""
        try:
            cls.model_validate({field: value})
        except ValidationError as error:
            # what has no place contradicts another field, here one's default
            if error.errors()[0]["loc"]:
                raise SpecError(explain(cls, error)) from None

    def with_fields(self, **changes: Any) -> Self:
        """A validated copy with some fields replaced (`model_copy` would skip validation)."""
        return type(self).parse(self.model_dump() | changes)


def _wants_number(annotation: Any) -> bool:
    """Whether a type is, or holds, `int` or `float`, and not `bool`."""
    parts = _parts(annotation)
    return bool(parts & {int, float}) and bool not in parts


def _parts(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    # what follows the type in `Annotated[int, Gt(0)]` is no type, and has none in it
    return {annotation} if not inner else set().union(*(_parts(part) for part in inner if part is not Ellipsis))


def check_version(version: int, known: int, what: str) -> int:
    """`version` if this program reads it. Raises `ValueError` that says which it reads."""
    if version > known:
        raise ValueError(f"this version reads {known} (a newer {what} needs a newer clo-offload)")
    if version < known:
        raise ValueError(f"this version reads {known} (an older clo-offload wrote this {what}: make it anew)")
    return version


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a pydantic error as one line: `design.tau = 3.0: must be at most 1`."""
    problems = error.errors()
    # a misspelt field is why another one is missing
    first = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    label = cls.__name__.removesuffix("Spec").lower()
    path = ".".join([label, *(str(part) for part in first["loc"])])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown field{_suggest(str(first['loc'][-1]), _fields_at(cls, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{path}: a value is required"
    message = first["msg"].removeprefix("Value error, ")
    shown = first["input"] if not isinstance(first["input"], dict) else None
    return f"{path} = {shown!r}: {message}" if shown is not None else f"{path}: {message}"


def _fields_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Fields of the record at `path` below `cls`."""
    for name in path:
        field = cls.model_fields.get(str(name))
        inner = [part for part in _parts(field.annotation) if isinstance(part, type)] if field else []
        cls = next((part for part in inner if issubclass(part, BaseModel)), cls)
    return list(cls.model_fields)


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})"
