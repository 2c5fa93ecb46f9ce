"""Files of weights: their formats, their tensors, and messages about files that hold none."""

from __future__ import annotations

import io
import json
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from components.errors import DataError
from components.models.weights import Weights, listed, standalone, why_not_saved
from pipeline.runtime.user_files import LFS_POINTER

USUAL_KEYS = ("state_dict", "model", "model_state_dict", "net")
"""Keys under which training scripts save a network. The first of these counts."""
_MAX_DEPTH = 5
"""Largest depth of nested dictionaries that is searched. A dictionary may contain itself."""
_ONLY_WEIGHTS = "torch.save({}.state_dict(), 'state_dict.pth')"


def read(data: bytes, where: str, key: str = "") -> Weights:
    """Return the tensors of a network in a file. The content tells the format.

    Args:
        key: key of the network in the file, e.g. ``ema.module`` for nested dictionaries.

    Raises:
        DataError: the file holds no weights, weights of several networks, or none under that key.
    """
    top = _content(data, where)
    networks = dict(_networks(top))
    # Tensors at the top of a file are a network only if it holds no other. Else they are metrics.
    if not networks and isinstance(top, dict):
        tensors = {k: v for k, v in top.items() if isinstance(k, str) and isinstance(v, Tensor)}
        networks = {"": tensors} if tensors else {}
    if key:
        if key not in networks:
            keys = listed(n for n in networks if n) or "none; leave the key out"
            raise DataError(f"{where} holds no weights under {key!r}; keys of weights in it: {keys}")
        chosen = key
    elif not networks:
        raise DataError(_no_tensors(top, where))
    else:
        # Every network has a matrix or a filter. Statistics and metrics beside it rarely do.
        with_matrix = {name: tensors for name, tensors in networks.items() if any(t.ndim > 1 for t in tensors.values())}
        networks = with_matrix or networks
        usual = [name for name in USUAL_KEYS if name in networks]
        if len(networks) > 1 and not usual:
            ways = listed(f"{where}#{name}" for name in networks if name)
            alone = "; or save the tensors at its top alone" if "" in networks else ""
            raise DataError(f"{where} holds the weights of {len(networks)} networks: name one, as in {ways}{alone}")
        chosen = usual[0] if usual else next(iter(networks))
    for name, tensor in networks[chosen].items():
        if reason := why_not_saved(tensor):
            raise DataError(
                f"{where}: {name!r} is {reason}; save ordinary tensors (dequantize(), to_dense()) in a state_dict"
            )
    tensors = networks[chosen]
    # The prefix is dropped here and not with the others: the hash of these tensors is part of the
    # addresses of models that start from them, and earlier versions dropped it here.
    bare = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    weights = Weights(bare if len(bare) == len(tensors) else tensors)
    weights.where = f"{where} (the weights under {chosen!r}; at its top: {listed(top)})" if chosen else where
    others = "" if key else listed(f"{where}#{name}" for name in networks if name not in ("", chosen))
    if others:
        weights.note = f"{where} holds several networks; the weights under {chosen!r} are taken. For others: {others}"
    return weights


def to_bytes(tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file of tensors, which may share memory.

    Raises:
        DataError: naming the first value that such a file cannot hold.
    """
    copies = standalone(tensors)
    for name, value in copies.items():
        if reason := why_not_saved(value):
            raise DataError(f"{name!r} is {reason}, which a safetensors file cannot hold")
    try:
        return safetensors_save(copies, metadata)
    except Exception as e:  # The format has errors of several types.
        raise DataError(f"a safetensors file cannot hold these tensors ({type(e).__name__}: {e})") from e


def is_safetensors(data: bytes) -> bool:
    """Tell whether a file begins as safetensors do: the length of a header, and the header."""
    return data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= 100_000_000


def why_no_weights(data: bytes, where: str) -> str:
    """Return what a file is, and what to do, if it holds no weights; "" if it may hold some."""
    begin = data[:512].lstrip().lower()
    first = " ".join(data[:200].decode(errors="replace").split())[:100]
    if not data:
        return "is empty: download or copy it again"
    # This comes first, since the bytes before its header can have any value.
    if is_safetensors(data):
        return _cut_short(data)
    if data.startswith(LFS_POINTER):
        size = next((line[5:] for line in data.decode(errors="replace").splitlines() if line.startswith("size ")), "?")
        return (
            f"is a Git LFS pointer to a file of {size} bytes, not the file itself: run git lfs pull in its repository"
        )
    if begin.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not weights: the download gave a page instead of the file; download it again"
    if begin.startswith(b"<"):
        return f"is XML or HTML, not weights ({first}): download it again"
    if begin.startswith((b"{", b"[")):
        return f"is JSON, not weights ({first}); download the file of weights itself"
    if data.startswith(b"\x1f\x8b"):
        return "is a gzip archive: unpack it first"
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "is an HDF5 file, as Keras saves: save the network as a state_dict of PyTorch"
    if data.startswith(b"\x93NUMPY"):
        return "is a NumPy array: save the network as a state_dict of PyTorch"
    if not data[:4096].strip(b"\0"):
        return "begins with zero bytes: download or copy it again"
    if data.startswith(b"PK"):
        return _archive(data, where)
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in data[:512]) and len(data) < 100_000 and b" " in data:
        return f"is text, not weights ({first}): download it again"
    return ""


def _cut_short(data: bytes) -> str:
    size = 8 + int.from_bytes(data[:8], "little")
    if len(data) < size:
        return "is a safetensors file that is cut short within its header: download or copy it again"
    try:
        header = json.loads(data[8:size])
        size += max((int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return ""  # Another format, or damaged: the reader of the format says so.
    if len(data) < size:
        missing = size - len(data)
        return f"is a safetensors file that is cut short: {missing} bytes are missing; download or copy it again"
    return ""


def _archive(data: bytes, where: str) -> str:
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError):
        return (
            "is cut short or damaged: it begins as a file of torch.save and its end is missing; "
            "download or copy it again"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        script = f"torch.jit.load({where!r}, map_location='cpu')"
        return f"is a TorchScript archive. Make a state_dict of it: {_ONLY_WEIGHTS.format(script)}"
    if any(name.endswith("data.pkl") for name in names):
        return ""
    if any(name.endswith(".npy") for name in names):
        return "is an archive of NumPy arrays: save the network as a state_dict of PyTorch"
    return f"is a zip archive of {listed(names) or 'nothing'}: unpack it first"


class _NumpyPlaceholder:
    """Placeholder of NumPy's objects, whose state is a tuple. It keeps nothing of them."""

    def __new__(cls, *args: object) -> _NumpyPlaceholder:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _placeholder(name: str) -> type:
    """Return a class in place of the named one, which is not imported: a file runs no code.

    Its instances are OrderedDicts: torch's reader fills no other type with items and attributes.
    """

    def new(cls: type, *args: object, **kwargs: object) -> OrderedDict[str, Any]:
        instance: OrderedDict[str, Any] = OrderedDict()
        vars(instance)["_kind"] = name
        return instance

    base = _NumpyPlaceholder if name.startswith("numpy.") else object
    return type("Placeholder", (base,), {} if base is _NumpyPlaceholder else {"__new__": new})


def _kind(value: object) -> str:
    """Return the class name behind a placeholder, or "" for types of PyTorch and Python."""
    return str(vars(value).get("_kind", "")) if isinstance(value, OrderedDict) else ""


def _content(data: bytes, where: str) -> Any:
    """Return the content of a file, with placeholders for objects that are not PyTorch's."""
    if reason := why_no_weights(data, where):
        raise DataError(f"{where} {reason}")
    try:
        if is_safetensors(data):
            return safetensors_load(data)
        placeholders: list[Any] = [(_placeholder(name), name) for name in sorted(set(_named_globals(data)))]
        with warnings.catch_warnings(), torch.serialization.safe_globals(placeholders):
            # They concern pickle protocols, which no user can change.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # Both formats have errors of several types.
        if "persistent_load" in str(e):  # The older format holds a module this way.
            raise DataError(_whole_module(where, "of an older format", "its classes")) from None
        raise DataError(
            f"{where} cannot be read as a state_dict ({_reason(e)}); copy it again. If it is whole, save the "
            f"weights alone: {_ONLY_WEIGHTS.format('network')}"
        ) from e


def _reason(error: Exception) -> str:
    """Return the line of a torch error that is about the file."""
    lines = [line for line in str(error).splitlines() if "weights_only" not in line and "\x1b" not in line]
    text = next((line.strip() for line in lines if line.strip()), "")
    text = text.removeprefix("WeightsUnpickler error:").partition("Please ")[0].partition(", please ")[0].strip()
    return f"{type(error).__name__}: {text[:200]}"


def _named_globals(data: bytes) -> Iterator[str]:
    """Yield the full names of the classes and functions in a file's pickles."""
    if data.startswith(b"PK"):
        archive = zipfile.ZipFile(io.BytesIO(data))
        pickles = io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
        count = 1
    else:
        # The older format has four pickles: a magic number, a version, the system, the content.
        pickles, count = io.BytesIO(data), 4
    for _ in range(count):
        for code, name, _ in pickletools.genops(pickles):
            if code.name == "GLOBAL":
                yield str(name).replace(" ", ".")


def _networks(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield key and tensors of each network in a file; optimizers and metrics are no networks."""
    if not isinstance(value, dict) or len(path) > _MAX_DEPTH:
        return
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if any(tensor.ndim for tensor in tensors.values()):
        yield ".".join(path), tensors
    for name, inner in value.items():
        if isinstance(name, str) and "optim" not in name.lower():
            yield from _networks(inner, (*path, name))


def _no_tensors(top: Any, where: str) -> str:
    begin = f"{where} holds no dictionary of tensors"
    for key, value in [("", top), *(top.items() if isinstance(top, dict) else ())]:
        if (kind := _kind(value)) and "_parameters" in vars(value):
            return _whole_module(where, kind, kind.partition(".")[0], f"[{key!r}]" if key else "")
    if isinstance(top, dict) and not _kind(top):
        return f"{begin}; at its top: {listed(top) or 'nothing'}. Give a state_dict: {_ONLY_WEIGHTS.format('network')}"
    return f"{begin}, but a {_kind(top) or type(top).__name__}. Give a state_dict: {_ONLY_WEIGHTS.format('network')}"


def _whole_module(where: str, kind: str, package: str, at: str = "") -> str:
    load = f"torch.load({where!r}, map_location='cpu', weights_only=False){at}"
    return (
        f"{where} holds a whole pickled module ({kind}), no dictionary of tensors. Loading it runs code of the file. "
        f"If you trust it, make a state_dict of it where {package} can be imported: {_ONLY_WEIGHTS.format(load)}"
    )
