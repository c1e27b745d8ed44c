"""From safetensors files into a module's parameters, tensor by tensor.

The headers of all files are compared with the module before any weight is read, so a checkpoint that does not fit is
refused at once and as a whole. Only safetensors: other formats are pickles, which run code when they are opened.
Knows names and shapes, not what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from losa_runtime.core.config_file import read_json
from losa_runtime.core.errors import CheckpointError
from losa_runtime.layers.pieces import Piece, places

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_LISTED = 8  # findings spelled out in one error


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it. Raises CheckpointError if a file or every safetensors file is missing."""
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: weight_map: found {weight_map!r}, allowed: tensor -> file name"
            )
        for file in sorted({str(f) for f in weight_map.values()}):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX_FILE}: weight_map: found {file!r}, allowed: *.safetensors beside it"
                )
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder}: {file} is missing, but {INDEX_FILE} refers to it")
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / SINGLE_FILE
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise CheckpointError(
            f"{folder}: found {pickles[0]} but no safetensors; pickled weights run code when they are opened and are "
            f"never loaded. Allowed: {SINGLE_FILE} or {INDEX_FILE} with its shards"
        )
    raise CheckpointError(f"{folder}: found no weights, allowed: {SINGLE_FILE} or {INDEX_FILE} with its shards")


def byte_progress(show: bool) -> Progress:
    """A progress bar in bytes on stderr; silent unless `show`."""
    label = TextColumn("{task.description}")
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)


def load_weights(
    folder: Path,
    module: nn.Module,
    tied: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    show_progress: bool,
    remake: Mapping[str, Callable[[str, Tensor], Tensor]] = MappingProxyType({}),
) -> None:
    """Fill every parameter of `module` (on the meta device) with an own copy in `dtype` on `device`.

    tied: tensors that may be present and then must equal the named parameter. remake: parameter -> what makes
    that which is kept on the device of (name, tensor in the file). The bar goes to stderr. Raises
    CheckpointError listing missing, unexpected, misshapen and non-float tensors before anything is read.
    """
    files = tensor_files(folder)
    expected = places(module)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_open(path)) for path in dict.fromkeys(files.values())}
        _check(folder, {name: place.shape for name, place in expected.items()}, tied, _headers(files, opened))
        total = sum(place.numel for place in expected.values()) * dtype.itemsize
        with byte_progress(show_progress) as progress:
            task = progress.add_task("loading weights", total=total)
            for name in sorted(expected, key=lambda n: (files[n], n)):
                piece, tensor = expected[name].piece, _read(opened[files[name]], name, folder)
                if piece.parameter in remake:
                    assign(module, piece.parameter, remake[piece.parameter](name, tensor))
                else:
                    _fill(module, piece, tensor, dtype, device)
                progress.advance(task, expected[name].numel * dtype.itemsize)
        for name, target in tied.items():
            if name in files:
                repeated = _read(opened[files[name]], name, folder).to(device=device, dtype=dtype)
                if not torch.equal(repeated, module.get_parameter(target)):
                    raise CheckpointError(
                        f"{folder}: {name} differs from {target}, but config.json says tie_word_embeddings = true"
                    )


def _fill(module: nn.Module, piece: Piece, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """An own copy of the tensor in its place; a parameter of several pieces is made with the first of them."""
    kept = piece.dtype or dtype
    if not piece.part:
        assign(module, piece.parameter, tensor.to(device=device, dtype=kept, copy=True))
        return
    whole = module.get_parameter(piece.parameter)
    if whole.is_meta:
        assign(module, piece.parameter, torch.empty(whole.shape, dtype=kept, device=device))
        whole = module.get_parameter(piece.parameter)
    whole[piece.part].copy_(tensor)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is not a readable safetensors file: {error}") from None


def _read(file: Any, name: str, folder: Path) -> Tensor:
    try:
        return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: {name} cannot be read: {error}") from None


def _headers(files: Mapping[str, Path], opened: Mapping[Path, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name -> shape and dtype name, of the tensors that really are in their files."""
    inside = {path: set(file.keys()) for path, file in opened.items()}
    found = {}
    for name, path in files.items():
        if name in inside[path]:
            view = opened[path].get_slice(name)
            found[name] = (tuple(view.get_shape()), str(view.get_dtype()))
    return found


def _check(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
    found: Mapping[str, tuple[tuple[int, ...], str]],
) -> None:
    findings = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    for name, (shape, kind) in sorted(found.items()):
        wanted = expected.get(name, expected.get(tied.get(name, "")))
        if wanted is None:
            findings.append(f"unexpected {name} {list(shape)}")
        elif shape != wanted:
            findings.append(f"{name}: expected {list(wanted)}, found {list(shape)}")
        elif kind not in _FLOATS:
            findings.append(f"{name}: expected one of {', '.join(sorted(_FLOATS))}, found {kind}")
    if findings:
        raise CheckpointError(f"{folder}: the weights do not fit the model: {_shortened(findings)}")


def _shortened(findings: Iterable[str]) -> str:
    listed = list(findings)
    more = len(listed) - _LISTED
    return "; ".join(listed[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter of that name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
