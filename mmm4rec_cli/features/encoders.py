"""Encoders: what turns a text or a picture into a vector. The only importer of transformers.

An encoder has two sides, one for texts and one for pictures. A side is the tower of a joint image-text model (SigLIP,
CLIP), a model of its own, or the weightless sketch; any text side goes with any image side. All vectors have unit
length. Weights are read from safetensors alone, and no code that comes with a model is ever run.

Sizes: B texts or pictures, T tokens, F feature width.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmm4rec_cli.errors import DataError, DeviceError, NetworkError, UsageError
from mmm4rec_cli.features.sketch import SketchImage, SketchText, normalised
from mmm4rec_cli.features.store import PRESETS, encoder_name
from mmm4rec_cli.files import sha256
from mmm4rec_cli.reporter import Reporter
from mmm4rec_cli.settings.schema import FeatureSettings

Floats = npt.NDArray[np.float32]
Prepared = Mapping[str, npt.NDArray[Any]]


class TextEncoder(Protocol):
    """The text side of an encoder."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors, as JSON; a part of the fingerprint."""

    def texts(self, batch: Sequence[str]) -> Floats:
        """Unit vectors float32 [B, F]; zeros where a text has nothing to go by."""


class ImageEncoder(Protocol):
    """The image side of an encoder."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors, as JSON; a part of the fingerprint."""

    def prepare(self, image: Image.Image) -> Prepared:
        """One RGB picture resized and normalised; called from several threads."""

    def images(self, batch: Sequence[Prepared]) -> Floats:
        """Unit vectors float32 [B, F]."""


@dataclass(frozen=True)
class Encoder:
    """Both sides.

    Attributes:
        name: name of the features file.
        text: the text side.
        image: the image side.
        models: the models' ids or folders as they were given; not a part of the identity.
    """

    name: str
    text: TextEncoder
    image: ImageEncoder
    models: dict[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors; a model is known by its weights, so folder and id of the same model agree."""
        return {"text": self.text.identity, "image": self.image.identity}


def load_encoder(settings: FeatureSettings, device: str, reporter: Reporter) -> Encoder:
    """Load both sides of the encoder that the settings name, from the disk or from the Hugging Face hub.

    Args:
        settings: `encoder`, `text_model`, `image_model`, `text_pooling` and `max_text_length` are looked at.
        device: auto, cpu, cuda or cuda:N.
        reporter: hears what the user should know about the choice.

    Raises:
        UsageError: no such encoder, or a model that has no such tower or pooling.
        DataError: a folder without the files of a model, or without weights as safetensors.
        DeviceError: no such device.
        NetworkError: the model is not on the disk and the hub does not answer.
    """
    joint = joint_model(settings)
    sources = {
        "text": PRESETS.get(settings.text_model, settings.text_model) if settings.text_model else joint,
        "image": PRESETS.get(settings.image_model, settings.image_model) if settings.image_model else joint,
    }
    if None in sources.values():
        reporter.warn("encoder sketch: hashed words and histograms, made for demos and tests, not for research")
    loaded = {
        source: _Loaded(source, device, reporter) for source in dict.fromkeys(sources.values()) if source is not None
    }
    text_source, image_source = sources["text"], sources["image"]
    text: TextEncoder = SketchText()
    image: ImageEncoder = SketchImage()
    if text_source is not None:
        text = _Text(loaded[text_source], settings.text_pooling, settings.max_text_length, reporter)
    if image_source is not None:
        image = _Image(loaded[image_source])
    models = {side: source or "sketch" for side, source in sources.items()}
    return Encoder(encoder_name(settings), text, image, models)


def joint_model(settings: FeatureSettings) -> str | None:
    """The id or folder of the model that serves the sides without one of their own; None for the sketch.

    Raises:
        UsageError: no such encoder.
    """
    name = settings.encoder
    if name in PRESETS:
        return PRESETS[name]
    if "/" in name or "\\" in name or Path(name).is_dir():
        return name
    if settings.text_model and settings.image_model:
        return name
    raise UsageError(
        f"features.encoder={name}: no such encoder",
        hint=f"take one of {', '.join(PRESETS)}, a Hugging Face id (owner/name), a folder, "
        "or --text-model with --image-model",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers and the hub from writing bars and reports of their own while they load."""
    import huggingface_hub.utils as hub
    import transformers.utils.logging as library
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    levels, bar = (library.get_verbosity(), hub.logging.get_verbosity()), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    hub.logging.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    try:
        yield
    finally:
        library.set_verbosity(levels[0])
        hub.logging.set_verbosity(levels[1])
        if bar:
            library.enable_progress_bar()  # type: ignore[no-untyped-call]
            enable_progress_bars()


_FILES = ["*.json", "*.txt", "*.model", "model.safetensors", "model-*-of-*.safetensors"]
"""What is fetched of a model: configuration, vocabulary, weights as safetensors; never pickles or code."""


def model_folder(source: str, reporter: Reporter) -> Path:
    """The folder of a model: the one named, or the hub's copy on this disk, fetched if need be.

    Raises:
        UsageError: no such folder, or the hub has no such model.
        DataError: the folder holds no model, or no weights as safetensors.
        NetworkError: the model is not on the disk and the hub does not answer.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder}: no config.json there", hint="name a folder written by save_pretrained")
        if not _weights(folder):
            raise _no_safetensors(source)
        return folder
    if source.count("/") > 1 or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source):
        raise UsageError(f"{source}: no such folder", hint="name a model's folder, or a Hugging Face id (owner/name)")
    try:
        found = Path(snapshot_download(source, allow_patterns=_FILES, local_files_only=True))
        if (found / "config.json").is_file() and _weights(found):
            return found
    except LocalEntryNotFoundError:
        pass
    try:
        with reporter.stage(f"fetching {source} from the Hugging Face hub"), _quiet():
            found = Path(snapshot_download(source, allow_patterns=_FILES))
    except (RepositoryNotFoundError, GatedRepoError):
        raise UsageError(
            f"{source}: the Hugging Face hub has no such model, or not for everyone",
            hint="check the id; for a private model log in with: hf auth login",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:160]
        raise NetworkError(
            f"{source}: not on this disk, and the Hugging Face hub cannot be had ({reason})",
            hint="name a folder with --text-model and --image-model, point HF_HOME to a filled cache, "
            "or take --encoder sketch",
        ) from None
    if not _weights(found):
        raise _no_safetensors(source)
    return found


def _no_safetensors(source: str) -> DataError:
    return DataError(
        f"{source}: no weights as safetensors, or not all of them (pickles are never loaded)",
        hint="take a model that has model.safetensors, or convert it once with save_pretrained",
    )


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of a model; empty if one is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    shards = [folder / name for name in sorted(names)]
    return shards if all(shard.is_file() for shard in shards) else []


def torch_device(name: str) -> Any:
    """The torch device of a name; `auto` is the GPU where there is one.

    Raises:
        DeviceError: no such device on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"runtime.device={name}: {reason}", hint="take --device cpu, or ask mmm4rec doctor") from None
    return device


class _Loaded:
    """A model on its device, once for both sides if it is joint."""

    def __init__(self, source: str, device: str, reporter: Reporter) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModel

        self.source = source
        self.device = torch_device(device)
        self.folder = model_folder(source, reporter)
        hashes = [sha256(path) for path in _weights(self.folder)]
        self.weights = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        try:
            with _quiet():
                model, report = AutoModel.from_pretrained(
                    self.folder,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{source}: not a model that can be loaded ({reason})", hint="name another model") from None
        missing = {str(key) for key in report["missing_keys"]}
        self.has_pooler = not any("pooler" in key for key in missing)
        lacking = sorted(key for key in missing if "pooler" not in key)
        if lacking:
            raise DataError(
                f"{source}: {len(lacking)} of the model's weights are not in the file, {lacking[0]} the first",
                hint="name a folder or id with complete weights",
            )
        self.model: Any = model.to(self.device).eval()
        self.config: Any = model.config

    def run(self, call: Any, inputs: Mapping[str, Any]) -> Any:
        """Call the model without gradients; running out of memory is the user's error."""
        import torch

        try:
            with torch.inference_mode():
                return call(**{key: value.to(self.device) for key, value in inputs.items()})
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"{self.source}: out of memory on {self.device}",
                hint="halve the batch with --set features.batch_size=…",
            ) from None


def _vectors(output: Any) -> Any:
    """The [B, F] tensor of a joint model's answer, which older releases give bare."""
    tensor = getattr(output, "pooler_output", output)
    return tensor if getattr(tensor, "ndim", 0) == 2 else None


class _Text:
    """The text side of a transformers model."""

    def __init__(self, loaded: _Loaded, pooling: str, max_length: int, reporter: Reporter) -> None:
        from transformers import AutoTokenizer

        self._loaded = loaded
        model, source = loaded.model, loaded.source
        self._joint = hasattr(model, "get_text_features")
        if not self._joint and (hasattr(model, "get_image_features") or _sees(loaded.config)):
            raise UsageError(f"{source}: a model without a text side", hint="name a text model with --text-model")
        try:
            with _quiet():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(loaded.folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{source}: its tokenizer cannot be loaded ({reason})", hint="name another model") from None
        # without its files some tokenizers load all the same, and know no word
        files = {"tokenizer.json", *self._tokenizer.vocab_files_names.values()}
        if not any((loaded.folder / name).is_file() for name in files):
            raise DataError(
                f"{source}: no tokenizer there ({', '.join(sorted(files))})",
                hint="save the tokenizer beside the model, with save_pretrained",
            )
        # SigLIP (1 and 2) saw lower-case texts, padded on the right to their full length, without a mask, and reads
        # its last place; the tokenizer files of SigLIP 2 do not all say so
        self._siglip = str(loaded.config.model_type).startswith("siglip")
        if self._siglip:
            self._tokenizer.padding_side = "right"
        text_config = getattr(loaded.config, "text_config", loaded.config)
        places = int(getattr(text_config, "max_position_embeddings", max_length))
        if text_config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"}:
            places -= int(text_config.pad_token_id) + 1  # their positions are counted from behind the padding id
        self._length = min(max_length, places)
        if self._length < max_length:
            reporter.note(f"{source} takes {places} tokens at most: texts are cut to that")
        self._mean = pooling == "mean" and not self._joint
        if not self._joint and not self._mean:
            if not (loaded.has_pooler and self._pooled_width()):
                raise UsageError(
                    f"features.text_pooling=pooled: {source} has no trained pooled output",
                    hint="take the mean over its tokens: --set features.text_pooling=mean",
                )
            if _wants_mean(loaded.folder):
                reporter.warn(
                    f"{source} was trained for the mean over its tokens: set features.text_pooling=mean to use it so"
                )

    def _pooled_width(self) -> int:
        pooled = getattr(self._loaded.run(self._loaded.model, self._tokens(["a"])), "pooler_output", None)
        return 0 if pooled is None else int(pooled.shape[-1])

    def _tokens(self, batch: Sequence[str]) -> dict[str, Any]:
        tokens = self._tokenizer(
            [text.lower() for text in batch] if self._siglip else list(batch),
            padding="max_length" if self._siglip else True,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        )
        return {key: value for key, value in tokens.items() if not (self._siglip and key == "attention_mask")}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors."""
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        return {
            "model": type(self._loaded.model).__name__,
            "weights": self._loaded.weights,
            "tokenizer": type(self._tokenizer).__name__,
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "max_length": self._length,
            "padding": "max_length" if self._siglip else "longest, masked",
            "case": "lower" if self._siglip else "the tokenizer's",
            "pooling": "joint" if self._joint else "mean" if self._mean else "pooled",
            "normalised": True,
            "dtype": "float32",
        }

    def texts(self, batch: Sequence[str]) -> Floats:
        """Unit vectors float32 [B, F]."""
        tokens = self._tokens(batch)
        model = self._loaded.model
        output = self._loaded.run(model.get_text_features if self._joint else model, tokens)
        if self._mean:
            states_BTF = output.last_hidden_state
            mask_BT1 = tokens["attention_mask"].to(states_BTF.device).unsqueeze(-1).to(states_BTF.dtype)
            vectors = (states_BTF * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        else:
            vectors = _vectors(output)
        if vectors is None:
            raise UsageError(f"{self._loaded.source}: gives no vector a text", hint="name another text model")
        return normalised(vectors.cpu().numpy())


def _sees(config: Any) -> bool:
    """Whether a model of one side takes pictures."""
    return hasattr(config, "image_size") or hasattr(config, "num_channels")


def _wants_mean(folder: Path) -> bool:
    """Whether a sentence-transformers model says that it was trained with the mean over its tokens."""
    path = folder / "1_Pooling" / "config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens"))


_PROCESSING = [
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_pad", "patch_size", "max_num_patches"),
]


class _Image:
    """The image side of a transformers model, with the processor that needs Pillow and numpy alone."""

    def __init__(self, loaded: _Loaded) -> None:
        from transformers import AutoImageProcessor
        from transformers.image_processing_backends import PilBackend

        self._loaded = loaded
        source = loaded.source
        self._joint = hasattr(loaded.model, "get_image_features")
        if not self._joint and not _sees(loaded.config):
            raise UsageError(f"{source}: a model without an image side", hint="name an image model with --image-model")
        try:
            with _quiet():
                load: Any = AutoImageProcessor.from_pretrained
                self._processor = load(loaded.folder, backend="pil", trust_remote_code=False)
        except (OSError, ValueError, ImportError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{source}: its image processor cannot be loaded ({reason})", hint="name another model"
            ) from None
        if not isinstance(self._processor, PilBackend):
            raise DataError(
                f"{source}: {type(self._processor).__name__} does not work on Pillow alone", hint="name another model"
            )
        white = self._inputs([self.prepare(Image.new("RGB", (32, 32), "white"))])
        pooled = None if self._joint else getattr(loaded.run(loaded.model, white), "pooler_output", None)
        self._pooled = loaded.has_pooler and pooled is not None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors."""
        settings = json.loads(self._processor.to_json_string())
        return {
            "model": type(self._loaded.model).__name__,
            "weights": self._loaded.weights,
            "processor": type(self._processor).__name__,
            "processing": {key: settings[key] for key in _PROCESSING if settings.get(key) is not None},
            "transparency": "on white",
            "pooling": "joint" if self._joint else "pooled" if self._pooled else "mean",
            "normalised": True,
            "dtype": "float32",
        }

    def prepare(self, image: Image.Image) -> Prepared:
        """One picture as the arrays that the model takes."""
        processed = self._processor(images=[image], return_tensors="np")
        return {key: np.asarray(value)[0] for key, value in processed.items()}

    @staticmethod
    def _inputs(batch: Sequence[Prepared]) -> dict[str, Any]:
        import torch

        return {key: torch.from_numpy(np.stack([one[key] for one in batch])) for key in batch[0]}

    def images(self, batch: Sequence[Prepared]) -> Floats:
        """Unit vectors float32 [B, F]."""
        inputs = self._inputs(batch)
        model = self._loaded.model
        output = self._loaded.run(model.get_image_features if self._joint else model, inputs)
        if self._joint:
            vectors = _vectors(output)
        elif self._pooled:
            vectors = output.pooler_output.flatten(1)
        else:
            vectors = self._mean(output.last_hidden_state, inputs)
        if vectors is None:
            raise UsageError(f"{self._loaded.source}: gives no vector a picture", hint="name another image model")
        return normalised(vectors.cpu().numpy())

    def _mean(self, states: Any, inputs: Mapping[str, Any]) -> Any:
        """The mean over the patches of [B, patches, F] or [B, F, height, width]; class tokens stay out."""
        if states.ndim == 4:
            return states.mean((2, 3))
        patch = getattr(self._loaded.config, "patch_size", None)
        if isinstance(patch, int):
            height, width = inputs["pixel_values"].shape[-2:]
            patches = (height // patch) * (width // patch)
            states = states[:, max(0, states.shape[1] - patches) :]
        return states.mean(1)
