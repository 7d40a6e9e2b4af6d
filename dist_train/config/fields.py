"""Kinds of values, and what every section is."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def off_is_false(value: Any) -> Any:
    """YAML reads off as false."""
    return "off" if value is False else value


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of HOST:PORT.

    Raises:
        ValueError: it has not both.
    """
    host, _, port = address.rpartition(":")
    if not host or ":" in host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT, for example gpu7:7070")
    return host, int(port)


def _address(address: str) -> str:
    host_and_port(address)
    return address


Address = Annotated[str, AfterValidator(_address)]
Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
# PyYAML reads 1e-4 as a string; pydantic makes it a float again.
Real = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Below1 = Annotated[Real, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
