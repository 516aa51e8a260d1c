"""Open Wan weights: a diffusers folder to a VideoDiT, or to the pieces of one that a rank holds, and back.

    FOLDER/                            a pipeline as diffusers saves it, or one of its transformer folders
        model_index.json               boundary_ratio of Wan 2.2 A14B
        transformer/                   config.json, *.safetensors and, with several, their index.json
        transformer_2/                 A14B only: the expert of low noise; `transformer` is that of high noise

Files are memory-mapped and read tensor by tensor, so a load needs the memory of one model, and a rank under ZeRO-3
that of its pieces. The only module of models/ that touches files; nothing is unpickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_config import UNUSED, from_diffusers, their_name, their_shapes, to_diffusers

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
SINGLE, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
PIPELINE = "model_index.json"
EXPERTS = {"high": "transformer", "low": "transformer_2"}
PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
FLOATING = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def load_wan(
    folder: str | Path,
    expert: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VideoDiT:
    """The transformer of a diffusers folder.

    Args:
        folder: a pipeline's, or a transformer's own.
        expert: `high` or `low` (noise) where the pipeline has two, Wan 2.2 A14B; see `expert_boundary`.
        dtype: of the weights in memory.
        device: where they go, one by one.

    Raises:
        ConfigError: there is no such folder, or it is not a Wan transformer in safetensors, complete and without more.
    """
    weights = WanWeights(folder, expert)
    with torch.device("meta"):
        model = VideoDiT(weights.config)
    state = {
        name: weights.read(name).view(parameter.shape).to(device, dtype) for name, parameter in model.named_parameters()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model


def expert_boundary(folder: str | Path) -> float | None:
    """The t from which on the pipeline samples with its expert of high noise; None where it has one transformer."""
    path = Path(folder) / PIPELINE
    if not path.is_file() or not (Path(folder) / EXPERTS["low"]).is_dir():
        return None
    boundary = _read_json(path).get("boundary_ratio")
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise ConfigError(f"{path}: boundary_ratio={boundary} is not between 0 and 1: Wan 2.2 has 0.875 or 0.9")
    return boundary


def starts_from_frames(folder: str | Path) -> bool:
    """Whether the pipeline takes a first frame in place of noise, with a t for each token: Wan 2.2 TI2V."""
    path = Path(folder) / PIPELINE
    return path.is_file() and _read_json(path).get("expand_timesteps") is True


def sampler_shift(folder: str | Path) -> float:
    """The shift that the pipeline's scheduler gives to t; 5, Wan's own for 720p, where it states none."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    values = _read_json(path) if path.is_file() else {}
    shift = next((values[name] for name in ("flow_shift", "shift") if name in values), 5.0)
    if not isinstance(shift, int | float) or not shift > 0:
        raise ConfigError(f"{path}: shift={shift!r} is not above 0: download it again")
    return float(shift)


class WanWeights:
    """The weights of a diffusers folder by our names, checked on opening: names and shapes, no data.

    Holds no open file, so it can be handed to another process.
    """

    def __init__(self, folder: str | Path, expert: str | None = None) -> None:
        """Raises ConfigError: see `load_wan`."""
        self.folder = transformer_folder(Path(folder), expert)
        self.config = from_diffusers(_read_json(self.folder / CONFIG), str(self.folder / CONFIG))
        self.shapes = their_shapes(self.config)
        files = _files_of_tensors(self.folder)
        self.files: dict[str, Path] = {}
        self._check(files)

    def _check(self, files: dict[str, Path]) -> None:
        expected = {their_name(name): name for name in self.shapes}
        found = {name for name in files if UNUSED not in name}
        lora = sorted(name for name in found if "lora_" in name)
        if lora:
            raise ConfigError(
                f"{self.folder} holds {lora[0]}, weights of a LoRA: merge it into the model and save that"
            )
        for what, names in (("lacks", expected.keys() - found), ("has the unknown", found - expected.keys())):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise ConfigError(
                    f"{self.folder} {what} {shown}: its {CONFIG} is of another model, or files are missing"
                )
        self.files = {ours: files[theirs] for theirs, ours in expected.items()}
        for path in sorted(set(self.files.values())):
            with _opened(path) as file:
                for name in (name for name, held in self.files.items() if held == path):
                    piece = file.get_slice(their_name(name))
                    shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
                    if shape != self.shapes[name] or dtype not in FLOATING:
                        raise ConfigError(
                            f"{path}: {their_name(name)} is {dtype} {shape}, its {CONFIG} asks for floating "
                            f"{self.shapes[name]}: quantised or other weights cannot be loaded"
                        )

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements [start, start + length) of a flattened parameter, in the file's precision, in memory of their own.

        Reads no more than the rows of the tensor that they lie in.

        Args:
            name: ours, as in `VideoDiT.named_parameters`.
            start: first element.
            length: how many; None: all that follow.

        Raises:
            KeyError: no such parameter.
            ValueError: the range is not inside it.
            ConfigError: the file has changed since.
        """
        shape = self.shapes[name]
        row = _num_elements(shape[1:])
        total = shape[0] * row
        end = total if length is None else start + length
        if not 0 <= start <= end <= total:
            raise ValueError(f"elements [{start}, {end}) of {name}, which has {total}")
        first, last = start // row, -(-end // row)
        with _opened(self.files[name]) as file:
            rows: Tensor = file.get_slice(their_name(name))[first:last]
            return rows.reshape(-1)[start - first * row : end - first * row].clone()

    def fill(self, pieces: Iterable[tuple[str, int, Tensor]]) -> None:
        """Fills flat views, each (name of the parameter, first element, view), whatever their type and device.

        What a rank holds under any ZeRO stage is such a list: `(f.name, f.start, f.master) for f in fragments(engine)`.
        """
        with torch.no_grad():
            for name, start, view in pieces:
                view.copy_(self.read(name, start, view.numel()))


def save_wan(model: VideoDiT, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes a folder that `WanTransformer3DModel.from_pretrained` loads; complete or absent.

    Args:
        model: whole, on any device; its precision is kept.
        folder: must not exist, or be empty.
        max_shard_bytes: of one file; a larger tensor is a file of its own.

    Raises:
        ConfigError: something stands in `folder`, or the model has something that diffusers' class has not.
        ValueError: parameters are not whole here (partitioned, or on the meta device).
    """
    parameters = dict(model.named_parameters())
    for name, shape in their_shapes(model.config).items():
        parameter = parameters[name]
        if parameter.is_meta or parameter.numel() != _num_elements(shape):
            raise ValueError(f"{name} is not whole here ({tuple(parameter.shape)}): gather the model first")
    sizes = {name: parameter.nbytes for name, parameter in parameters.items()}
    write_wan(model.config, sizes, lambda name: parameters[name], folder, max_shard_bytes)


def write_wan(
    config: ModelConfig,
    sizes: dict[str, int],
    read: Callable[[str], Tensor],
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`save_wan` of a model that need not be in memory: the tensors of one file are read, written, forgotten.

    Args:
        config: of the model.
        sizes: bytes of each of its parameters, by our names.
        read: gives the whole parameter of a name.
        folder: as for `save_wan`.
        max_shard_bytes: as for `save_wan`.
    """
    settings = json.dumps(to_diffusers(config), indent=2) + "\n"
    shapes = their_shapes(config)
    names = {their_name(name): name for name in shapes}

    def read_theirs(name: str) -> Tensor:
        return read(names[name]).reshape(shapes[names[name]])

    their_sizes = {name: sizes[ours] for name, ours in names.items()}
    write_tensors(folder, STEM, their_sizes, read_theirs, {CONFIG: settings}, max_shard_bytes)


def write_tensors(
    folder: str | Path,
    stem: str,
    sizes: dict[str, int],
    read: Callable[[str], Tensor],
    texts: dict[str, str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes STEM.safetensors, or STEM-00001-of-… and their index.json, and text files; complete or absent.

    Args:
        folder: must not exist, or be empty.
        stem: of the file names.
        sizes: bytes of each tensor, by name.
        read: gives the tensor of a name.
        texts: further files: name and content.
        max_shard_bytes: of one file; a larger tensor is a file of its own.

    Raises:
        ConfigError: something stands in `folder`, or it cannot be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists: give a folder that does not")
    temporary = target.parent / f".writing-{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}): give another folder") from error
    try:
        _write_all(temporary, stem, list(_shards(sizes, max_shard_bytes)), read, texts)
        temporary.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:  # a full disk, mostly
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(f"{target} cannot be written ({error}): give another folder") from error


def _write_all(
    folder: Path, stem: str, shards: list[list[str]], read: Callable[[str], Tensor], texts: dict[str, str]
) -> None:
    places: dict[str, str] = {}
    total_size = 0
    for number, names in enumerate(shards, 1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: read(name).detach().cpu().contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name, text in texts.items():
        (folder / name).write_text(text)
    for path in (*folder.iterdir(), folder):
        _sync(path)


def transformer_folder(folder: Path, expert: str | None) -> Path:
    """The folder with the transformer's config.json. Raises ConfigError when it, or which of two, is not clear."""
    if expert is not None and expert not in EXPERTS:
        raise ConfigError(f"expert={expert} is not known: use high or low")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder here: give that of a Wan pipeline or transformer of diffusers")
    if (folder / CONFIG).is_file():
        if expert is not None:
            raise ConfigError(
                f"expert={expert}, but {folder} is one transformer: give the pipeline's folder, or no expert"
            )
        return folder
    has_two = (folder / EXPERTS["low"]).is_dir()
    if has_two != (expert is not None):
        fix = "give expert=high or expert=low" if has_two else "give no expert"
        raise ConfigError(f"{folder} has {'two experts' if has_two else 'one transformer'}: {fix}")
    chosen = folder / EXPERTS[expert or "high"]
    if not (chosen / CONFIG).is_file():
        raise ConfigError(f"{chosen} holds no {CONFIG}: give the folder of a Wan pipeline or transformer of diffusers")
    return chosen


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor, by diffusers' names."""
    if (folder / INDEX).is_file():
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(each, str) for each in places.values()):
            raise ConfigError(f"{folder / INDEX} holds no weight_map: download it again")
        for file in sorted(set(places.values())):
            if Path(file).name != file or not (folder / file).is_file():
                raise ConfigError(f"{folder / INDEX} names {file}, which is not there: download it again")
            _refuse_pickles(folder / file)
        held = {file: set(_names(folder / file)) for file in sorted(set(places.values()))}
        for name, file in places.items():
            if name not in held[file]:
                raise ConfigError(f"{folder / file} lacks {name}, which {INDEX} places there: download it again")
        return {name: folder / file for file, names in held.items() for name in names}
    candidates = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE) in candidates:
        candidates = [folder / SINGLE]
    if len(candidates) == 1:
        return dict.fromkeys(_names(candidates[0]), candidates[0])
    if candidates:
        raise ConfigError(f"{folder} holds {len(candidates)} safetensors but no {INDEX}: download that too")
    for path in sorted(folder.iterdir()):
        _refuse_pickles(path)
    raise ConfigError(f"{folder} holds no safetensors: give the folder of a Wan transformer of diffusers")


def _refuse_pickles(path: Path) -> None:
    if path.suffix in PICKLED:
        raise ConfigError(f"{path} is pickled, which can run code: convert it to safetensors")


def _opened(path: Path) -> Any:
    """The file, memory-mapped, for one read: an open one would keep every page it has read in memory."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({str(error).splitlines()[0]}): download it again") from error


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings: download it again")
    return values


def _shards(sizes: dict[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Names of neighbouring tensors that stay within `max_bytes` together."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > max_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _num_elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
