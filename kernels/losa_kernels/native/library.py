"""Finding and loading the shared library, and what it can do on this CPU.

The C structures mirror csrc/losa_kernels.h; LOSA_ABI there and ABI here change together.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

ABI = 7
LEVELS = ("portable", "avx2", "avx512")
SHARES = {"max": 0, "mean": 1, "none": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_HEAD_DIM = 512
FILE = Path(__file__).with_name("liblosa_kernels.so")


class NativeUnavailable(Exception):
    """The kernels cannot be used here; the text says why. Whoever can do without them may."""


class NativeUnfit(Exception):
    """The kernels are there, but not those that are needed or asked for; the text says what mends it. Nobody should
    quietly do without them."""


class CRun(ctypes.Structure):
    """LosaRun."""

    _fields_ = (("level", c_int32), ("threads", c_int32), ("error", c_char * 240))


class CPool(ctypes.Structure):
    """LosaPool."""

    _fields_ = (
        ("pages", c_int64),
        ("kv_heads", c_int32),
        ("page_size", c_int32),
        ("head_dim", c_int32),
        ("dtype", c_int32),
        ("k", c_void_p),
        ("v", c_void_p),
        ("bounds", c_void_p),
        ("moments", c_void_p),
    )


class CGroup(ctypes.Structure):
    """LosaGroup."""

    _fields_ = (
        ("segments", c_int64),
        ("table_indptr", c_void_p),
        ("table", c_void_p),
        ("prefix_lens", c_void_p),
        ("block_length", c_int64),
    )


class CQuery(ctypes.Structure):
    """LosaQuery."""

    _fields_ = (
        ("q", c_void_p),
        ("total", c_int64),
        ("rows", c_void_p),
        ("count", c_int64),
        ("heads", c_int32),
        ("scale", c_float),
    )


class CLists(ctypes.Structure):
    """LosaLists."""

    _fields_ = (
        ("indptr", c_void_p),
        ("indices", c_void_p),
        ("index_count", c_int64),
        ("whole", c_void_p),
        ("granule", c_int64),
        ("heads", c_int32),
        ("per_row", c_int32),
    )


class CPrefix(ctypes.Structure):
    """LosaPrefix."""

    _fields_ = (
        ("out", c_void_p),
        ("lse", c_void_p),
        ("places", c_int64),
        ("place", c_void_p),
        ("fresh_out", c_void_p),
        ("fresh_lse", c_void_p),
        ("rows", c_void_p),
        ("count", c_int64),
        ("heads", c_void_p),
    )


class CAutomaton(ctypes.Structure):
    """LosaAutomaton."""

    _fields_ = (
        ("states", c_int64),
        ("classes", c_int64),
        ("next", c_void_p),
        ("class_of", c_void_p),
        ("accepting", c_void_p),
        ("bytes_left", c_void_p),
    )


class CGuided(ctypes.Structure):
    """LosaGuided."""

    _fields_ = (
        ("blocks", c_int64),
        ("grammars", c_void_p),
        ("indptr", c_void_p),
        ("tokens", c_void_p),
        ("states", c_void_p),
        ("rooms", c_void_p),
        ("path", c_void_p),
        ("drawn", c_void_p),
        ("holes", c_int64),
        ("width", c_int64),
        ("logits", c_void_p),
        ("kept", c_void_p),
        ("sharpness", c_void_p),
        ("total", c_void_p),
        ("uniform", c_void_p),
    )


class CExperts(ctypes.Structure):
    """LosaExperts."""

    _fields_ = (
        ("count", c_int64),
        ("hidden", c_int64),
        ("width", c_int64),
        ("dtype", c_int32),
        ("gate_up", c_void_p),
        ("down", c_void_p),
    )


_RUN, _POOL, _GROUP, _QUERY = POINTER(CRun), POINTER(CPool), POINTER(CGroup), POINTER(CQuery)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "losa_prefix": (_RUN, _POOL, _GROUP, _QUERY, POINTER(CLists), c_void_p, c_void_p, c_void_p, c_int64),
    "losa_prefill": (_RUN, _POOL, _GROUP, _QUERY, c_void_p, c_void_p),
    "losa_block": (
        *(_RUN, _QUERY, c_void_p, c_void_p),
        *(c_int64, c_int32, c_int32, POINTER(CPrefix), c_void_p, c_void_p),
    ),
    "losa_merge": (_RUN, c_int64, c_int32, *(c_void_p,) * 5),
    "losa_page_scores": (_RUN, _POOL, _GROUP, _QUERY, c_int64, c_void_p),
    "losa_select_pages": (
        *(_RUN, _POOL, _GROUP, _QUERY),
        *(c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_int64),
        *(c_void_p,) * 3,
    ),
    "losa_prefix_mass": (_RUN, _POOL, _GROUP, _QUERY, c_void_p, c_int64, c_int32, c_int64, c_void_p),
    "losa_changed_rows": (
        *(_RUN, c_void_p, c_void_p, c_int32),
        *(c_int64,) * 5,
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int32),
        *(c_void_p,) * 3,
    ),
    "losa_mix_experts": (_RUN, POINTER(CExperts), c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p),
    "losa_store": (_RUN, _POOL, c_void_p, c_void_p, c_int32, c_void_p, c_int64),
    "losa_words_new": (_RUN, c_int64, c_void_p, c_char_p, POINTER(c_void_p)),
    "losa_words_free": (c_void_p,),
    "losa_grammar_new": (
        *(_RUN, c_void_p, POINTER(CAutomaton), c_void_p),
        *(c_int64,) * 5,
        POINTER(c_void_p),
    ),
    "losa_grammar_free": (c_void_p,),
    "losa_grammar_bytes": (c_void_p,),
    "losa_grammar_walk": (_RUN, c_void_p, c_void_p, c_int64, POINTER(c_int64)),
    "losa_grammar_left": (_RUN, c_void_p, c_int64, c_int64, POINTER(c_int64)),
    "losa_guide": (_RUN, POINTER(CGuided), *(c_void_p,) * 3),
    "losa_settle": (_RUN, POINTER(CGuided), *(c_void_p,) * 4),
}
NO_STATUS = {"losa_words_free": None, "losa_grammar_free": None, "losa_grammar_bytes": c_int64}


@cache
def _load(file: Path) -> ctypes.CDLL:
    if not file.exists():
        raise NativeUnavailable(f"{file.name} was not built: run `make kernels` (needs a C++ compiler)")
    try:
        library = ctypes.CDLL(str(file))
        found = library.losa_abi()
    except (OSError, AttributeError) as error:
        raise NativeUnfit(f"{file} cannot be loaded ({error}): run `make kernels`, or remove it") from None
    if found != ABI:
        raise NativeUnfit(f"{file} has interface {found}, needed: {ABI}; run `make kernels`")
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes = types
    for name, kind in NO_STATUS.items():
        getattr(library, name).restype = kind
    return library


class Kernels:
    """The loaded library at one level of SIMD instructions.

    level: "avx512", "avx2" or "portable"; None = LOSA_SIMD from the environment, else the best of this CPU.
    file: another build of the library, None = LOSA_KERNELS from the environment, else the one in this folder.
    Raises NativeUnavailable, or NativeUnfit for a library of other sources or a LOSA_SIMD that this CPU lacks.
    """

    def __init__(self, level: str | None = None, file: Path | None = None) -> None:
        self._library = _load(file or Path(os.environ.get("LOSA_KERNELS") or FILE))
        offered = [name for number, name in enumerate(LEVELS) if self._library.losa_has_level(number)]
        wanted = level or os.environ.get("LOSA_SIMD") or offered[-1]
        if wanted not in offered:
            unmet = NativeUnavailable if level else NativeUnfit
            raise unmet(f"{'level' if level else 'LOSA_SIMD'}: found {wanted!r}, this CPU offers: {', '.join(offered)}")
        self.level, self.offered = wanted, tuple(offered)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a kernel on torch's number of threads. Raises ValueError with the kernel's reason."""
        run = CRun(LEVELS.index(self.level), torch.get_num_threads())
        if getattr(self._library, name)(ctypes.byref(run), *arguments):
            raise ValueError(f"{name}: {run.error.decode()}")

    def ask(self, name: str, handle: c_void_p) -> int:
        """A number about what a handle stands for."""
        return int(getattr(self._library, name)(handle))

    def free(self, name: str, handle: c_void_p) -> None:
        """Give back what a handle stands for; nobody uses it any more."""
        getattr(self._library, name)(handle)
