"""Saving and loading of rules: ``config.json`` and ``model.safetensors``, in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from metakern.core.checksum import check_digest, digest
from metakern.core.files import check_targets, write_whole
from metakern.core.plain_data import check_flat, read_json
from metakern.core.requirements import required
from metakern.core.text import quoted
from metakern.rules import hub
from metakern.rules.model_card import MARK, model_card
from metakern.rules.protocol import Rule
from metakern.rules.registry import as_rule, get, name_of

#: File names in a folder of save_pretrained, as the Hub expects them.
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

#: Version of the saved format; a file of another version is refused.
FORMAT_VERSION = "1"

_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_Saved = TypeVar("_Saved", bound="PretrainedRule")


class PretrainedRule(Rule):
    """Base of rules with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The constructor's arguments are saved in ``config.json``, and must be attributes of the same names: numbers, texts,
    and learned numbers (tensors [], saved with the weights). The weights are saved under their ``state_dict`` names.
    Files hold only tensors and JSON: loading one runs no code. The Hub needs ``pip install 'metakern[hub]'``.

    Attributes:
        optional_options: constructor arguments that may be missing from a saved rule

    Example:
        >>> CoordinatewiseLSTM().save_pretrained("my-rule")
        >>> rule = CoordinatewiseLSTM.from_pretrained("my-rule")
    """

    optional_options: ClassVar[tuple[str, ...]] = ("horizon", "trained_on")

    @classmethod
    def pretrained(cls, name: str) -> Self:
        """Load a rule that ships with the package.

        ``digits_lstm``, ``digits_rnnprop``, ``digits_mlp`` and ``digits_hierarchical_rnn`` were meta-trained on
        classifiers of 8×8 digits with one hidden layer of 20 sigmoid units, for 100 steps. On other networks, and for
        more steps, ``digits_lstm`` needs an ``lr`` of 0.03 to 0.3 that decays, and the others one to be tuned; see
        :class:`metakern.optim.learned_optimizer.LearnedOptimizer`. ``general`` is for any network.

        Raises:
            ValueError: for an unknown name; the message lists the shipped ones.
        """
        return cls._from_folder(shipped_folder(name))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str | torch.device = "cpu", **kwargs: Any
    ) -> Self:
        """Load a rule from a folder of ``save_pretrained``, or by name: a shipped rule first, then the Hub.

        Args:
            pretrained_model_name_or_path: the folder, the name of a rule that ships with the package, or the rule's
                name on the Hugging Face Hub, ``"owner/name"``
            map_location: device of the weights
            kwargs: options that override the saved ones; and for the Hub ``revision``, ``cache_dir``,
                ``force_download``, ``local_files_only`` and ``token``, as in ``huggingface_hub.snapshot_download``

        Raises:
            ValueError: for files that are missing, damaged, of another version or inconsistent, and for an unknown
                name; the message names them.
            TypeError: for an option that the rule does not have
            ModuleNotFoundError: for a Hub name without huggingface_hub installed
        """
        fetch = {key: kwargs.pop(key) for key in hub.OPTIONS if key in kwargs}
        return cls._from_folder(_find(pretrained_model_name_or_path, fetch), map_location, **kwargs)

    @classmethod
    def _from_folder(cls, folder: Path, map_location: str | torch.device = "cpu", **given: Any) -> Self:
        known = cls.option_types()
        unknown = given.keys() - known.keys()
        if unknown:
            raise TypeError(f"options of {cls.__name__} are {sorted(known)}, got {quoted(sorted(unknown))}")
        config = _read_config(folder, known, cls.optional_options)
        weights = _read_weights(folder / WEIGHTS, name_of(cls), map_location)
        try:
            rule = cls.from_saved(config | given, weights)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG} does not describe a {cls.__name__}: {error}") from error
        return _with_weights(rule, weights, folder / WEIGHTS, map_location)

    @classmethod
    def from_saved(cls, options: dict[str, Any], weights: Mapping[str, Tensor]) -> Self:
        """A rule with the saved options; an option that is null is a learned number in ``weights``, loaded next."""
        learned = [name for name, value in options.items() if value is None and name in weights]
        return cls(**options | {name: nn.Parameter(weights[name].clone()) for name in learned})

    def saved_options(self) -> dict[str, Any]:
        """The current options for config.json; null for learned numbers."""
        options = {name: getattr(self, name) for name in self.option_types()}
        return {name: None if isinstance(value, Tensor) else value for name, value in options.items()}

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """The constructor's options and their types, all of which are saved."""
        hints = typing.get_type_hints(cls.__init__)
        return {name: hints.get(name, Any) for name in inspect.signature(cls).parameters}

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> str | None:
        """Write the options, the weights and a model card into a folder.

        An existing card that this method did not write is kept.

        Args:
            save_directory: the folder; created if needed
            push_to_hub: whether to upload the rule too
            repo_id: its name on the Hub; the folder's name by default
            kwargs: further arguments of :meth:`push_to_hub`

        Returns:
            the URL of the commit on the Hub, or None

        Raises:
            ValueError: for weights that could not be loaded again: NaN, infinity, several dtypes
            OSError: where one of the files to write is a link or a folder
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"{sorted(kwargs)} need push_to_hub=True")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._save(folder)
        return self.push_to_hub(repo_id or folder.name, **kwargs) if push_to_hub else None

    def _save(self, folder: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        _check_weights("the rule", tensors)
        options = json.dumps(self.saved_options(), sort_keys=True, indent=2)
        metadata = {
            "format": "pt",
            "metakern_format": FORMAT_VERSION,
            "rule": name_of(type(self)),
            "sha256": digest(tensors),
        }
        check_targets(folder, (WEIGHTS, CONFIG, CARD))
        with required():
            from safetensors.torch import save
        write_whole(folder / WEIGHTS, save(tensors, metadata=metadata))
        write_whole(folder / CONFIG, options.encode())
        card = folder / CARD
        if not card.exists() or MARK in card.read_text(errors="replace"):
            write_whole(card, model_card(self).encode())

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the rule to the Hugging Face Hub, in one commit.

        Args:
            repo_id: its name, ``"owner/name"``
            kwargs: ``private``, ``token``, and arguments of ``huggingface_hub.HfApi.upload_folder``:
                ``commit_message``, ``branch`` (its ``revision``), ``create_pr``, ``allow_patterns``,
                ``ignore_patterns``, ``delete_patterns``

        Returns:
            the URL of the commit

        Raises:
            ModuleNotFoundError: where huggingface_hub is not installed
        """
        return hub.upload(self._save, repo_id, **kwargs)

    def generate_model_card(self) -> Any:
        """The card as a ``huggingface_hub.ModelCard``."""
        return hub.card(model_card(self))


def load(name_or_path: str | Path, *, map_location: str | torch.device = "cpu", **options: Any) -> PretrainedRule:
    """Load a saved rule; its file names the class, which must be registered.

    Args:
        name_or_path: as for :meth:`PretrainedRule.from_pretrained`, likewise all below
        map_location: device of the weights
        options: options that override the saved ones, and options of the Hub

    Raises:
        ValueError: for a rule of an unregistered class, and as from_pretrained
        TypeError, ModuleNotFoundError: as from_pretrained

    Example:
        >>> rule = metakern.rules.load("digits_lstm")
    """
    folder = _find(name_or_path, {key: options.pop(key) for key in hub.OPTIONS if key in options})
    _check_files(folder)
    found, _ = read_file(folder / WEIGHTS, "cpu")
    try:
        rule = get(str(found.get("rule")))
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from error
    if not issubclass(rule, PretrainedRule):
        raise ValueError(
            f"{folder / WEIGHTS} is of the rule {found['rule']}, which is no metakern.rules.PretrainedRule"
        )
    return rule._from_folder(folder, map_location, **options)


def pretrained(name: str, **options: Any) -> PretrainedRule:
    """A rule that ships with the package, by its name.

    ``"general"`` is for any network: a :class:`metakern.rules.GuidedAdam` that can be put in Adam's place, without a
    learning rate to tune. The others, ``digits_...``, are for small networks on digits.

    Args:
        name: its name
        options: options that override the saved ones, as ``total_steps=1000`` for ``"general"``

    Raises:
        ValueError: for an unknown name; the message lists the shipped ones.
        TypeError: for an option that the rule does not have

    Example:
        >>> rule = metakern.rules.pretrained("general")
    """
    return load(shipped_folder(name), **options)


def trained_or_named(rule: Any, name: str = "rule") -> Any:
    """A rule that is ready for use: itself, that of a shipped name, or of a rule without weights by name.

    Raises:
        ValueError: for any other name; the message lists the known ones.
    """
    if not isinstance(rule, str):
        return rule
    shipped = _shipped()
    if rule in shipped:
        return pretrained(rule)
    try:
        return as_rule(rule, name)
    except ValueError as error:
        raise ValueError(f"{error}; rules that ship with their weights are {', '.join(shipped)}") from error


def read_file(path: Path, map_location: str | torch.device) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    with required():
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt", device=str(map_location)) as file:
            found = file.metadata() or {}
            return found, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file: {error}") from error


def _read_weights(path: Path, rule: str, map_location: str | torch.device) -> dict[str, Tensor]:
    """The weights; ValueError for a file that is damaged, of another version or of another rule."""
    found, tensors = read_file(path, map_location)
    for key, expected in (("metakern_format", FORMAT_VERSION), ("rule", rule)):
        if found.get(key) != expected:
            raise ValueError(f"{path} must have {key} {expected!r} in its metadata, got {found.get(key)!r}")
    check_digest(path, found, tensors)
    _check_weights(str(path), tensors)
    return tensors


def _with_weights(rule: _Saved, weights: Mapping[str, Tensor], path: Path, map_location: str | torch.device) -> _Saved:
    """Load weights into the rule and move it to ``map_location``; ValueError where they do not fit its options."""
    for tensor in weights.values():
        rule.to(tensor.dtype)  # otherwise loading would round
        break
    try:
        rule.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights that its config.json describes: {error}") from error
    return rule.to(map_location).eval()


def shipped_folder(name: str) -> Path:
    """The folder of a rule that ships with the package; ValueError for an unknown name."""
    shipped = _shipped()
    if name not in shipped:
        raise ValueError(f"pretrained rule must be one of {', '.join(shipped) or '(none installed)'}, got {name!r}")
    return shipped[name]


def _shipped() -> dict[str, Path]:
    """The folders of the rules that ship with the package, by name."""
    root = Path(str(resources.files("metakern") / "rules" / "weights"))
    return {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir()} if root.is_dir() else {}


def _find(name_or_path: str | Path, fetch: dict[str, Any]) -> Path:
    """The folder of a rule: a local folder, a shipped rule, or a download from the Hub."""
    folder, name, shipped = Path(name_or_path).expanduser(), str(name_or_path), _shipped()
    if folder.is_dir() and (name not in shipped or (folder / CONFIG).exists()):
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
    return hub.download(name, [CONFIG, WEIGHTS], fetch)


def _check_files(folder: Path) -> None:
    for needed in (folder / CONFIG, folder / WEIGHTS):
        if not needed.is_file():
            raise ValueError(f"{folder} is not a folder of save_pretrained: it lacks {needed.name}")


def _read_config(folder: Path, options: dict[str, Any], optional: tuple[str, ...]) -> dict[str, Any]:
    """The options in config.json; ValueError where a file or an option is missing, unknown or of a wrong type."""
    config = folder / CONFIG
    _check_files(folder)
    try:
        content = check_flat(read_json(config))
    except OSError as error:
        raise ValueError(f"{config} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{config} is damaged or no configuration: {error}") from error
    needed_options = options.keys() - set(optional)
    if not needed_options <= content.keys():
        raise ValueError(f"{config} must hold the options {sorted(needed_options)}, got {quoted(sorted(content))}")
    for name, value in content.items():
        if name not in options:
            raise ValueError(f"{config} must hold the options {sorted(options)} alone, got {quoted(name)}")
        if not _is_of(value, options[name]):
            raise ValueError(
                f"{config}: {name} must be {_kind(options[name])}, got {quoted(value)} of type {type(value).__name__}"
            )
    return content


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value matches an annotation; a bool is no number, and an integer may stand for a float."""
    if kind is Any:
        return True
    kinds = typing.get_args(kind) or (kind,)
    learned = value is None and Tensor in kinds
    return type(value) in kinds or (type(value) is int and float in kinds) or learned


def _kind(kind: Any) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    words[Tensor] = "null"  # learned, so saved with the weights
    return " or ".join(words[each] for each in typing.get_args(kind) or (kind,))


def _check_weights(where: str, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless all weights are finite and of one supported dtype."""
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
