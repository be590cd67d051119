"""How kept tokens are written in a page: one file per format."""

from vllm_kvcompress.formats.base import RECORD, Format, RecordFormat, arrange
from vllm_kvcompress.formats.hybrid import K4V2, K4V3, K4V4, K8V4
from vllm_kvcompress.formats.kivi import Kivi2, Kivi4, Kivi8
from vllm_kvcompress.formats.matched import Matched
from vllm_kvcompress.formats.mixed import Auto, Mixed
from vllm_kvcompress.formats.mixed_dim import Latent, MixedDim
from vllm_kvcompress.formats.turboquant import (
    Turbo2,
    Turbo3,
    Turbo4,
    TurboCentred2,
    TurboCentred3,
    TurboCentred4,
    TurboProd2,
    TurboProd3,
    TurboProd4,
)

__all__ = [
    "EVERY_FORMAT",
    "FORMATS",
    "MATCHED",
    "RECORD",
    "Format",
    "Latent",
    "Matched",
    "Mixed",
    "MixedDim",
    "RecordFormat",
    "arrange",
    "get_format",
    "number_of",
]

_KIVI: tuple[type[Format], ...] = (Kivi8, Kivi4, Kivi2)
_TURBO: tuple[type[Format], ...] = (Turbo4, Turbo3, Turbo2, TurboProd4, TurboProd3, TurboProd2)
_CENTRED: tuple[type[Format], ...] = (TurboCentred4, TurboCentred3, TurboCentred2)
_HYBRID: tuple[type[Format], ...] = (K8V4, K4V4, K4V3, K4V2)
_MIXED: tuple[type[Format], ...] = (Auto, MixedDim)
FORMATS: dict[str, Format] = {
    format.name: format() for format in _KIVI + _TURBO + _CENTRED + _HYBRID + _MIXED
}
# What a method that matches writes where users say one of `FORMATS`.
MATCHED: dict[str, Matched] = {
    name: Matched(format) for name, format in FORMATS.items() if isinstance(format, RecordFormat)
}
EVERY_FORMAT: tuple[Format, ...] = (*FORMATS.values(), *MATCHED.values())


def number_of(format: Format | None) -> int:
    """What arrays on a device say of a format: its place in `EVERY_FORMAT`, counted from 1; 0 for none."""
    return 0 if format is None else 1 + EVERY_FORMAT.index(format)


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[name]
