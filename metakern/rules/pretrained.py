"""Saving and loading of rules: ``config.json`` and ``model.safetensors``, in a folder or on the Hugging Face Hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from metakern._digest import check_digest, digest
from metakern._files import check_targets, write_whole
from metakern._plain_data import check_flat, quoted, read_json

#: Version of the saved format; a file of another version is refused.
FORMAT_VERSION = "1"


#: Options that say how a rule runs, not what it computes: a saved rule need not have them.
RUNTIME_OPTIONS = ("precision", "bfloat16_state", "backend")


class PretrainedRule(nn.Module, PyTorchModelHubMixin):
    """Base of rules that are saved and shared: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

    Files hold tensors and JSON alone: loading one runs no code.
    """

    @classmethod
    def pretrained(cls, name: str) -> Self:
        """A rule that ships with the package.

        Raises:
            ValueError: for a name that does not; the message lists those that do.
        """
        root = resources.files("metakern") / "pretrained"
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        if name not in names:
            raise ValueError(f"pretrained rule must be one of {', '.join(names) or '(none installed)'}, got {name!r}")
        return cls.from_pretrained(str(root / name))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a rule from a folder of ``save_pretrained`` or, by its name, from the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: the folder or the name
            kwargs: options that replace the saved ones, and those of ``huggingface_hub.PyTorchModelHubMixin``

        Raises:
            ValueError: for files that are missing, damaged, of another version or at odds; the message names them.
        """
        folder = Path(pretrained_model_name_or_path)
        name = str(pretrained_model_name_or_path)
        is_path = (
            isinstance(pretrained_model_name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
        )
        if is_path and not folder.is_dir():  # no name of the Hub: the network need not be asked for it
            raise ValueError(f"{folder} is not a folder")
        if folder.is_dir():
            _check_folder(folder, set(cls._hub_mixin_init_parameters) - {"self", *RUNTIME_OPTIONS})
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {
            "format": "pt",
            "metakern_format": FORMAT_VERSION,
            "rule": type(self).__name__,
            "sha256": digest(tensors),
        }
        # The files that huggingface_hub writes beside them, too: none goes where a link points to.
        check_targets(save_directory, (constants.SAFETENSORS_SINGLE_FILE, constants.CONFIG_NAME, "README.md"))
        write_whole(save_directory / constants.SAFETENSORS_SINGLE_FILE, save(tensors, metadata=metadata))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> Self:
        """Find the weights in a folder or fetch them, build the rule that config.json describes and load them."""
        if Path(model_id).is_dir():
            path = str(Path(model_id) / constants.SAFETENSORS_SINGLE_FILE)
        else:
            path = hf_hub_download(
                model_id,
                constants.SAFETENSORS_SINGLE_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        try:
            rule = cls(**model_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{model_id}/config.json does not describe a {cls.__name__}: {error}") from error
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
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) == 1:
            model.to(dtypes.pop())  # or loading would round
        try:
            model.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ValueError(
                f"{model_file} does not hold the weights that its config.json describes: {error}"
            ) from error
        return model.to(map_location).eval()


def _check_folder(folder: Path, options: set[str]) -> None:
    """Raise ValueError unless the folder holds both files and config.json holds every option."""
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
    if not options <= content.keys():
        raise ValueError(f"{config} must hold the options {sorted(options)}, got {quoted(sorted(content))}")
