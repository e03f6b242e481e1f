"""Adapters on a model: add one, save it alone, load it, switch between several, take them off.

A saved adapter is a folder with peft's `adapter_config.json` and `adapter_model.safetensors`, and
`adapter.json` with what peft does not know: the kind, the class of the model, and names of classes where it
has a table of its own. The model is a transformer or a pipeline that has one; its own weights are never
written to.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import safetensors.torch as safetensors
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import PeftConfig, inject_adapter_in_model
from peft.functional import get_peft_model_state_dict, set_adapter, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ditkit import registry
from ditkit.adapters.base import Adapter
from ditkit.adapters.clock import unwatch
from ditkit.adapters.layers import block_layers, named_layers
from ditkit.files import whole_file, write_text
from ditkit.models.layers import LabelDropout, relabelled

FACTS = "adapter.json"
CLASSES = "y_embedder"
PREFIX = "base_model.model."  # of every name in peft's files

_trainable: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()


class AdapterError(ValueError):
    """An adapter that is not there, is damaged, or does not fit the model; the message says what to do."""


def network(model: Any) -> nn.Module:
    """The transformer of a pipeline, or the module itself.

    Raises:
        AdapterError: neither.
    """
    found = getattr(model, "transformer", model)
    if not isinstance(found, nn.Module):
        raise AdapterError(
            f"a transformer or a pipeline that has one is needed, not a {type(model).__name__}"
        )
    return found


def names(model: Any) -> list[str]:
    """The adapters that are on a model, in the order in which they came."""
    return list(getattr(network(model), "peft_config", {}))


def add(
    model: Any,
    adapter: Adapter,
    name: str = "default",
    layers: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Put a fresh adapter on a model, to be trained; it changes nothing yet, and all else is frozen.

    Args:
        adapter: its kind and options.
        name: to switch by.
        layers: names of layers or their endings; None: those of every block.
        classes: names of the classes of new data: the adapter gets a table of them, each as the null class.

    Raises:
        AdapterError: the name is taken, another kind of adapter is on the model, or it chooses parts of its
            layers.
        ValueError: layers that are not there, or classes on a model that has none.
    """
    module = network(model)
    both = adapter.convolutions
    chosen = block_layers(module, both) if layers is None else named_layers(module, layers, both)
    if classes is not None and not isinstance(
        getattr(module, CLASSES, None), LabelDropout | ModulesToSaveWrapper
    ):
        raise ValueError(f"classes: {type(module).__name__} is not conditioned on classes")
    config = adapter.config(chosen, () if classes is None else (CLASSES,))
    _inject(module, config, name, classes)
    module.__dict__.setdefault("adapter_facts", {})[name] = _facts(module, adapter, classes)


def save(model: Any, folder: str | Path, name: str = "default") -> Path:
    """Write one adapter, and nothing of the model; each file is whole or absent.

    Raises:
        AdapterError: there is no such adapter.
    """
    module, folder = network(model), Path(folder)
    _check_known(module, [name])
    settings: Any = module.peft_config
    found = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    tensors = {f"{PREFIX}{key}": value.detach().cpu().contiguous().clone() for key, value in found.items()}
    config = {**settings[name].to_dict(), "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    header = {"format": "pt"}
    if config["peft_type"] == "LORA":  # diffusers reads its settings from the header
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(
            {f"{PREFIX}{key}": value for key, value in config.items()}
        )
    with whole_file(folder / SAFETENSORS_WEIGHTS_NAME) as part:
        safetensors.save_file(tensors, part, metadata=header)
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    facts = module.__dict__.get("adapter_facts", {}).get(name)
    if facts is not None:
        write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")
    return folder


def load(model: Any, folder: str | Path, name: str | None = None, weight: float = 1.0) -> str:
    """Put a saved adapter on a model and switch to it alone.

    Args:
        folder: what `save`, `ditkit adapt` or peft wrote.
        name: to switch by; None: the folder's, with dashes for dots.
        weight: how much of it is added; 0 is the model alone, 1 what was trained.

    Returns:
        The name.

    Raises:
        FileNotFoundError: no such folder, or no adapter in it.
        AdapterError: it is of another model or damaged, or its name is taken.
    """
    module, folder = network(model), Path(folder)
    name = folder.resolve().name.replace(".", "-") if name is None else name
    facts = read_facts(folder)
    here = type(module).__name__
    if facts and facts["model"] != here:
        raise AdapterError(f"{folder} was made for a {facts['model']}, this model is a {here}")
    registry.entries("adapter")  # peft knows a kind of ours once its file is imported
    before = names(module)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        tensors = safetensors.load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except Exception as error:  # safetensors and json have errors of their own
        raise AdapterError(f"{folder} holds no adapter that can be read: {error}") from error
    try:
        _inject(module, config, name, facts.get("classes"))
        tensors = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
        result = set_peft_model_state_dict(module, tensors, adapter_name=name)
        missing = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
        if missing or result.unexpected_keys:
            raise AdapterError(f"no value for {missing[:3]}, no place for {result.unexpected_keys[:3]}")
    except (RuntimeError, KeyError, ValueError) as error:
        if name not in before:
            remove(module, name)
        raise AdapterError(f"{folder} does not fit this {here}: {error}") from error
    module.__dict__.setdefault("adapter_facts", {})[name] = facts or None
    use(module, {name: weight})
    return name


def read_facts(folder: Path) -> dict[str, Any]:
    """What `adapter.json` says; empty for an adapter that peft wrote.

    Raises:
        FileNotFoundError: no adapter there.
        AdapterError: the file is damaged.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"no adapter at {folder}: it has no {CONFIG_NAME}")
    if not (folder / FACTS).is_file():
        return {}
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return {"model": facts["model"], **facts}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder / FACTS} is damaged: {error!r}") from error


def use(model: Any, *chosen: str | Mapping[str, float]) -> None:
    """Switch to these adapters, which add up; none: the model alone, bit for bit as it was.

    Args:
        chosen: names, or a mapping of names to weights.

    Raises:
        AdapterError: no such adapter, or several that each have a table of classes.
    """
    module = network(model)
    weights: dict[str, float] = {}
    for one in chosen:
        weights |= {one: 1.0} if isinstance(one, str) else one
    _check_known(module, list(weights))
    for part in module.modules():
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            part.enable_adapters(bool(weights))
    if not weights:
        return
    with_classes = [name for name in weights if _classes_of(module, name)]
    if len(with_classes) > 1:
        raise AdapterError(f"{' and '.join(with_classes)} each have classes of their own: use one of them")
    set_adapter(module, list(weights), inference_mode=True)
    layers: list[Any] = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        for name, weight in weights.items():
            layer.set_scale(name, weight)


def remove(model: Any, name: str | None = None) -> None:
    """Take an adapter off, or all of them; after the last one the model has no trace of any.

    Raises:
        AdapterError: no such adapter.
    """
    module: Any = network(model)
    if name is not None:
        _check_known(module, [name])
    gone = names(module) if name is None else [name]
    for one in gone:
        _take_off(module, one, last=not set(names(module)) - {one})


def _take_off(module: Any, name: str, last: bool) -> None:
    """Delete an adapter, one too that is on some of the layers only."""
    for part in module.modules():
        if isinstance(part, BaseTunerLayer):
            part._active_adapter = [other for other in part.active_adapters if other != name]
            part.delete_adapter(name)
        elif isinstance(part, AuxiliaryTrainingWrapper):
            part.delete_adapter(name, new_active_adapters=[])
    for kept in ("peft_config", "adapter_facts"):
        getattr(module, kept, {}).pop(name, None)
    if last:
        _unwrap(module)


def _inject(module: Any, config: Any, name: str, classes: Sequence[str] | None) -> None:
    if hasattr(module, "choosing"):
        raise AdapterError(
            f"a {type(module).__name__} runs parts of its layers, chosen anew at each step, which an adapter "
            "would not be part of: adapt the model that it was made of"
        )
    present = getattr(module, "peft_config", {})
    if name in present:
        raise AdapterError(f"an adapter {name!r} is on the model already: {', '.join(present)}")
    if "." in name or not name:
        raise AdapterError(f"{name!r} is no name for an adapter: it must not be empty or hold a dot")
    others = {name for name, kind in present.items() if kind.peft_type != config.peft_type}
    if others:
        raise AdapterError(
            f"{', '.join(sorted(others))} on the model is of another kind: adapters of one model are of one "
            "kind, remove it first"
        )
    if not present:
        _trainable[module] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, module, name)
    except Exception:
        _take_off(module, name, last=not present)
        raise
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = True  # so that diffusers' own set_adapters and the like work too
    if classes is not None:
        wrapper = getattr(module, CLASSES)
        wrapper.modules_to_save[name] = relabelled(wrapper.original_module, classes)


def _unwrap(module: Any) -> None:
    """Put every wrapped layer back in its place."""
    wrapped = [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    for name, part in wrapped:
        inner = part.get_base_layer() if isinstance(part, BaseTunerLayer) else part.original_module
        module.set_submodule(name, inner)
    unwatch(module)
    for attribute in ("peft_config", "adapter_facts"):
        module.__dict__.pop(attribute, None)
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = False
    for parameter in _trainable.pop(module, []):
        parameter.requires_grad_(True)


def _facts(module: nn.Module, adapter: Adapter, classes: Sequence[str] | None) -> dict[str, Any]:
    entry = registry.entry_of(adapter)
    return {
        "kind": entry.name if entry else type(adapter).__name__,
        "options": asdict(adapter),  # pyright: ignore[reportArgumentType]
        "model": type(module).__name__,
        "classes": None if classes is None else list(classes),
    }


def _classes_of(module: nn.Module, name: str) -> bool:
    wrapper = getattr(module, CLASSES, None)
    return isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save


def _check_known(module: nn.Module, wanted: Sequence[str]) -> None:
    present = names(module)
    if unknown := [name for name in wanted if name not in present]:
        raise AdapterError(
            f"no adapter {unknown[0]!r} on the model; there are: {', '.join(present) or 'none'}"
        )
