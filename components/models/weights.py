"""Assignment of a file's tensors to a network's: prefixes, tied tensors, and errors of a misfit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from components.errors import DataError

SHOWN = 3
"""Largest number of names of each kind in a message."""
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
"""Prefixes of DistributedDataParallel and DataParallel, and those of torch.compile, also within
names."""
_COUNTERS = ("n_averaged",)
"""Keys that torch's AveragedModel writes beside the weights of the network that it averages."""


class Weights(dict[str, Tensor]):
    """Tensors of one network, read from a file."""

    where: str = ""
    """File, for messages."""
    note: str = ""
    """Note for the user on how the tensors were chosen, or empty."""


def renamed(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors under the names that the network has for them.

    Names that fit are kept. Otherwise the prefixes of wrappers, and one prefix that all names
    share, are dropped or added. Of all these mappings the one by which most tensors fit is taken.
    """
    state = net.state_dict()
    bare = {_WRAPPERS.sub("", name): name for name in state}
    names = {name: _WRAPPERS.sub("", name) for name in tensors if name in state or name not in _COUNTERS}
    mappings = [{name: name for name in tensors}]
    if len(bare) == len(state) and len(set(names.values())) == len(names):
        mappings += [
            {name: bare.get(new + short[len(old) :], new + short[len(old) :]) for name, short in names.items()}
            for old in _shared_prefixes(names.values())
            for new in _shared_prefixes(bare.keys())
        ]
    best = max(mappings, key=lambda m: (sum(_fits(state.get(new), tensors[k]) for k, new in m.items()), -len(m)))
    return {new: tensors[name] for name, new in best.items()}


def _shared_prefixes(names: Collection[str]) -> list[str]:
    """Return the prefixes that all names have, shortest first: "", "model.", "model.net.", ..."""
    first = next(iter(names), "")
    prefixes = ["", *(first[: dot.end()] for dot in re.finditer(r"\.", first))]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]


def _fits(value: object, tensor: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == tensor.shape and value.is_complex() == tensor.is_complex()


def load_strictly(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load weights into a network: every name must be present with its shape, and no other.

    If the network has a tensor under several names, one name is enough: safetensors' ``save_model``
    leaves the others out.

    Args:
        where: the file, for messages.

    Raises:
        DataError: the weights are of another architecture.
    """
    state, tensors = net.state_dict(), dict(tensors)
    for names in _tied(state):
        present = [name for name in names if name in tensors]
        for name in present[1:]:
            if not _equal(tensors[name], tensors[present[0]]):
                raise DataError(
                    f"{where}: {present[0]} and {name} are one tensor in {type(net).__name__}, but differ in the file"
                )
        if present:
            tensors = {**dict.fromkeys(names, tensors[present[0]]), **tensors}
    different_kind = [k for k, v in tensors.items() if k in state and v.is_complex() != _is_complex(state[k])]
    try:
        if different_kind:
            raise TypeError(f"{different_kind[0]} is complex on one side alone")
        net.load_state_dict(tensors, strict=True)
    except Exception as e:  # A network's own hooks may raise anything.
        raise DataError(f"{where} {_difference(net, state, tensors, e)}") from e


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _is_complex(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_complex()


def _tied(state: Mapping[str, Any]) -> list[list[str]]:
    """Return the groups of names that stand for one tensor."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _difference(net: nn.Module, state: Mapping[str, Any], tensors: Mapping[str, Tensor], error: Exception) -> str:
    name = type(net).__name__
    # Older files lack num_batches_tracked, which batch norm does not need.
    missing = [k for k in state if k not in tensors and not k.endswith("num_batches_tracked")]
    extra = [k for k in tensors if k not in state]
    shapes = [
        f"{k} is {_shape(tensors[k])} in the file, {_shape(state[k])} in the network"
        for k in state
        if k in tensors and not _fits(state[k], tensors[k])
    ]
    if not (missing or extra or shapes):
        first = next(iter(str(error).splitlines()[-1:]), "").strip()
        return f"holds weights that {name} does not take ({type(error).__name__}: {first})"
    fit = sum(_fits(state.get(k), v) for k, v in tensors.items())
    lines = [f"holds the weights of another architecture: {fit} of the {len(state)} tensors of {name} fit"]
    for what, names in (("missing", missing), ("too many", extra), ("of another shape", shapes)):
        if names:
            lines.append(f"{what}: {listed(names)}")
    lines.append("name the network that they are of (--arch with --model, else --train.arch), or give other weights")
    return "\n  ".join(lines)


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return ("complex " if value.is_complex() else "") + ("x".join(map(str, value.shape)) or "a number")


def listed(names: Iterable[str]) -> str:
    """Join the first names of many, and the number of the remaining ones."""
    names = [str(name) for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def standalone(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return contiguous copies in CPU memory that share no memory, as a file needs them.

    Values that are not ordinary tensors are returned unchanged.
    """
    seen: set[int] = set()
    copies: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and why_not_saved(tensor) == "":
            copy = tensor.detach().cpu().contiguous()
            memory = copy.untyped_storage().data_ptr()
            copies[name] = copy.clone() if memory in seen else copy
            seen.add(memory)
        else:
            copies[name] = tensor
    return copies


def why_not_saved(value: object) -> str:
    """Return why a value cannot be saved as plain numbers, or "" if it can."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.is_quantized:
        return "a quantised tensor"
    if value.layout is not torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.is_meta:
        return "a tensor without data"
    if value.dtype is torch.complex128:
        return "a complex128 tensor"
    return ""
