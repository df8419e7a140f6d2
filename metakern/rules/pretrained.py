"""Saving and loading of rules: ``config.json`` and ``model.safetensors``, in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import json
import typing
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from metakern.core.checksum import check_digest, digest
from metakern.core.files import check_targets, write_whole
from metakern.core.plain_data import check_flat, quoted, read_json

#: Version of the saved format; a file of another version is refused.
FORMAT_VERSION = "1"

#: Options that a saved rule need not have: how a rule runs, and what is known of it.
OPTIONAL = ("precision", "bfloat16_state", "backend", "horizon", "trained_on")

#: Options of from_pretrained that say what to fetch.
_HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")

_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CARD_MARK = "<!-- written by save_pretrained of metakern, which replaces it -->"


class PretrainedRule(nn.Module, PyTorchModelHubMixin):
    """Base of rules that are saved and shared: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

    Files hold tensors and JSON alone: loading one runs no code.

    Attributes:
        horizon: steps that the rule was meta-trained for, or None
        trained_on: what it was meta-trained on, or None
    """

    horizon: int | None
    trained_on: str | None

    @classmethod
    def pretrained(cls, name: str) -> Self:
        """A rule that ships with the package.

        ``digits_lstm`` was meta-trained on classifiers of 8×8 digits with one hidden layer of 20 sigmoid units, for 100
        steps. On other networks, and for more steps, it needs an ``lr`` of 0.03 to 0.3 that decays; see
        :class:`metakern.optim.learned_optimizer.LearnedOptimizer`.

        Raises:
            ValueError: for a name that does not; the message lists those that do.
        """
        shipped = _shipped()
        if name not in shipped:
            raise ValueError(f"pretrained rule must be one of {', '.join(shipped) or '(none installed)'}, got {name!r}")
        return cls._from_folder(shipped[name])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a rule from a folder of ``save_pretrained``, or by its name: what ships first, then the Hub.

        Args:
            pretrained_model_name_or_path: the folder, the name of a rule that ships with the package, or the rule's
                name on the Hugging Face Hub, ``"owner/name"``
            kwargs: options that replace the saved ones, and those of ``huggingface_hub.PyTorchModelHubMixin``

        Raises:
            ValueError: for files that are missing, damaged, of another version or at odds, and for a name that is none;
                the message names them.
        """
        fetch = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
        return cls._from_folder(_find(pretrained_model_name_or_path, fetch), **kwargs)

    @classmethod
    def _from_folder(cls, folder: Path, **kwargs: Any) -> Self:
        hints = typing.get_type_hints(cls.__init__)
        options = {name: hints.get(name, Any) for name in cls._hub_mixin_init_parameters if name != "self"}
        _check_folder(folder, options)
        return super().from_pretrained(str(folder), **kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """A card that says what the rule is, what it was trained on if that is known, and its limits."""
        if args or kwargs:
            raise TypeError(f"the model card takes no arguments, got {[*args, *kwargs]}")
        name = type(self).__name__
        trained = "It is not recorded what this rule was meta-trained on."
        limits = (
            "A learned optimizer serves networks like those that it was meta-trained on, and for as many steps. "
            "Beyond them its loss may stall or rise."
        )
        if self.trained_on is not None:
            trained = f"Meta-trained on {self.trained_on.rstrip('.')}."
        if self.horizon is not None:
            trained += f" Its episodes had {self.horizon} steps."
            limits += f" LearnedOptimizer warns once after step {self.horizon}."
        else:
            trained += " It is not recorded for how many steps."
        content = f"""---
library_name: metakern
tags:
- learned-optimizer
- meta-learning
---
{_CARD_MARK}

# {name}

{self.described()}

## Training

{trained}

## Limits

{limits} For other networks tune `lr` as for any optimizer, and let it decay; `digits_lstm` wants 0.03 to 0.3.

## Use

```python
from metakern.optim.learned_optimizer import LearnedOptimizer
from metakern.rules import {name}

rule = {name}.from_pretrained("path/to/this/folder")
optimizer = LearnedOptimizer(model.parameters(), rule)
```
"""
        return ModelCard(content)

    def described(self) -> str:
        """What the rule is, for its model card."""
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        _check_weights("the rule", tensors)
        metadata = {
            "format": "pt",
            "metakern_format": FORMAT_VERSION,
            "rule": type(self).__name__,
            "sha256": digest(tensors),
        }
        # The files that huggingface_hub writes beside them, too: none goes where a link points to.
        names = constants.SAFETENSORS_SINGLE_FILE, constants.CONFIG_NAME, constants.REPOCARD_NAME
        check_targets(save_directory, names)
        write_whole(save_directory / constants.SAFETENSORS_SINGLE_FILE, save(tensors, metadata=metadata))
        # The options as they are now, where the base class would write those of the constructor.
        options = {name: getattr(self, name) for name in self._hub_mixin_init_parameters if name != "self"}
        text = json.dumps(options, sort_keys=True, indent=2)
        write_whole(save_directory / constants.CONFIG_NAME, text.encode())
        card = save_directory / constants.REPOCARD_NAME
        if card.is_file() and _CARD_MARK in card.read_text(errors="replace"):
            card.unlink()  # of what was saved here before; the base class leaves a card that is there

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str = "cpu",
        strict: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Build the rule that config.json describes, and load the weights; what says where to fetch from is unused."""
        try:
            rule = cls(**model_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{model_id}/config.json does not describe a {cls.__name__}: {error}") from error
        path = str(Path(model_id) / constants.SAFETENSORS_SINGLE_FILE)
        return cls._load_as_safetensor(rule, path, map_location, strict)

    @classmethod
    def _load_as_safetensor(  # type: ignore[override]  # the base class leaves the model's type open
        cls, model: Self, model_file: str, map_location: str, strict: bool
    ) -> Self:
        """Load the weights; ValueError names the file where it is damaged, of another version or of another rule."""
        try:
            with safe_open(model_file, framework="pt", device=map_location) as file:
                found = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{model_file} is truncated, damaged or not a safetensors file: {error}") from error
        for key, expected in (("metakern_format", FORMAT_VERSION), ("rule", cls.__name__)):
            if found.get(key) != expected:
                raise ValueError(f"{model_file} must have {key} {expected!r} in its metadata, got {found.get(key)!r}")
        check_digest(model_file, found, tensors)
        _check_weights(model_file, tensors)
        for tensor in tensors.values():
            model.to(tensor.dtype)  # or loading would round
            break
        try:
            model.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ValueError(
                f"{model_file} does not hold the weights that its config.json describes: {error}"
            ) from error
        return model.to(map_location).eval()


def _shipped() -> dict[str, Path]:
    """The folders of the rules that ship with the package, by name."""
    root = Path(str(resources.files("metakern") / "rules" / "weights"))
    return {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir()} if root.is_dir() else {}


def _find(name_or_path: str | Path, fetch: dict[str, Any]) -> Path:
    """The folder of a rule; one that does not ship, and is no folder here, is fetched from the Hub."""
    folder, name, shipped = Path(name_or_path).expanduser(), str(name_or_path), _shipped()
    if folder.is_dir() and (name not in shipped or (folder / constants.CONFIG_NAME).exists()):
        return folder
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{folder} is not a folder")
    if name in shipped:
        return shipped[name]
    if "/" not in name:
        raise ValueError(
            f"a pretrained rule must be a folder, one of {', '.join(shipped)}, which ship with the package, or "
            f"'owner/name' on the Hugging Face Hub, got {name!r}"
        )
    files = [constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE]
    return Path(snapshot_download(name, allow_patterns=files, **fetch))


def _check_folder(folder: Path, options: dict[str, Any]) -> None:
    """Raise ValueError unless the folder holds both files and config.json holds every option, each of its type."""
    config = folder / constants.CONFIG_NAME
    for needed in (config, folder / constants.SAFETENSORS_SINGLE_FILE):
        if not needed.is_file():
            raise ValueError(f"{folder} is not a folder of save_pretrained: it lacks {needed.name}")
    try:
        content = check_flat(read_json(config))
    except OSError as error:
        raise ValueError(f"{config} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{config} is damaged or no configuration: {error}") from error
    needed_options = options.keys() - set(OPTIONAL)
    if not needed_options <= content.keys():
        raise ValueError(f"{config} must hold the options {sorted(needed_options)}, got {quoted(sorted(content))}")
    for name, value in content.items():
        if name not in options:
            raise ValueError(f"{config} must hold the options {sorted(options)} alone, got {quoted(name)}")
        if not _is_of(value, options[name]):
            raise ValueError(
                f"{config}: {name} must be {_kind(options[name])}, got {quoted(value)} of type {type(value).__name__}"
            )


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is what an annotation says: a bool is no number, an integer is a float."""
    if kind is Any:
        return True
    kinds = typing.get_args(kind) or (kind,)
    return type(value) in kinds or (type(value) is int and float in kinds)


def _kind(kind: Any) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return " or ".join(words[each] for each in typing.get_args(kind) or (kind,))


def _check_weights(where: str, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless all weights are finite and of one dtype that rules have."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    for name, tensor in tensors.items():
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise ValueError(
                f"{where} must have weights of {', '.join(str(dtype) for dtype in _WEIGHT_DTYPES)}, got {tensor.dtype} "
                f"for {name}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{where} must have finite weights, got NaN or infinity in {name}")
    if len(dtypes) > 1:
        raise ValueError(f"{where} must have weights of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
