"""Encoders: what turns a text or a picture into a vector. The only importer of transformers.

An encoder has two sides, one for texts and one for pictures. A side is the tower of a joint image-text model (SigLIP,
CLIP, BLIP), a model of its own, or the weightless sketch; any text side goes with any image side. All vectors have unit
length. Weights are read from safetensors alone, and no code that comes with a model is ever run.

Each side has two halves: a preparer, which goes through pickle into other processes and knows no weights, and a model.

Sizes: B texts or pictures, T tokens, F feature width.
"""

import hashlib
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmm4rec_cli.errors import DataError, DeviceError, NetworkError, UsageError
from mmm4rec_cli.features.prepare import Arrays, Pictures, Preparers, Texts
from mmm4rec_cli.features.sketch import SketchImage, SketchText, normalised
from mmm4rec_cli.features.store import PAIRS, PRESETS, Side, encoder_name
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

    @property
    def preparer(self) -> Callable[[Sequence[str]], Arrays]:
        """Makes texts ready for `stream`; goes through pickle."""

    def stream(self, batches: Iterable[Arrays]) -> Iterator[Floats]:
        """Unit vectors float32 [B, F] of texts made ready, batch by batch; takes batches ahead where that is faster."""

    def texts(self, batch: Sequence[str]) -> Floats:
        """Unit vectors float32 [B, F]; zeros where a text has nothing to go by."""


class ImageEncoder(Protocol):
    """The image side of an encoder."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors, as JSON; a part of the fingerprint."""

    @property
    def preparer(self) -> Callable[[Image.Image], Prepared]:
        """Makes one RGB picture ready for `stream`; goes through pickle."""

    def stream(self, batches: Iterable[Arrays]) -> Iterator[Floats]:
        """Unit vectors float32 [B, F] of pictures made ready, as `TextEncoder.stream`."""

    def prepare(self, image: Image.Image) -> Prepared:
        """One RGB picture resized and normalised, as its processor does it."""

    def images(self, batch: Sequence[Prepared]) -> Floats:
        """Unit vectors float32 [B, F] of pictures from `prepare` or from the preparer."""


@dataclass(frozen=True)
class Encoder:
    """Both sides.

    Attributes:
        name: name of the features file.
        text: the text side.
        image: the image side.
        models: the models' ids or folders as they were given; not a part of the identity.
        on_gpu: whether a model computes on a GPU.
    """

    name: str
    text: TextEncoder
    image: ImageEncoder
    models: dict[Side, str]
    on_gpu: bool = False

    def batch_size(self, side: Side, settings: FeatureSettings) -> int:
        """Texts or pictures a call: as set, else what fills the device without filling its memory."""
        if settings.batch_size != "auto":
            return settings.batch_size
        return {"text": 512, "image": 256}[side] if self.on_gpu else 32

    @property
    def preparers(self) -> Preparers:
        """What makes each side's jobs ready."""
        return {"text": Texts(self.text.preparer), "image": Pictures(self.image.preparer)}

    def side(self, side: Side) -> TextEncoder | ImageEncoder:
        """One of both sides."""
        return self.text if side == "text" else self.image

    def width(self, side: Side) -> int:
        """F of one side's vectors."""
        ready = self.preparers[side](["text"] if side == "text" else [None])
        assert ready.arrays is not None
        return int(next(self.side(side).stream([ready.arrays])).shape[1])

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors; a model is known by its weights, so folder and id of the same model agree."""
        return {"text": self.text.identity, "image": self.image.identity}


def load_encoder(settings: FeatureSettings, device: str, reporter: Reporter) -> Encoder:
    """Load both sides of the encoder that the settings name, from the disk or from the Hugging Face hub.

    Args:
        settings: `encoder`, `text_model`, `image_model`, `text_pooling`, `max_text_length`, `precision`
            and `batch_size` are looked at.
        device: auto, cpu, cuda or cuda:N.
        reporter: hears what the user should know about the choice.

    Raises:
        UsageError: no such encoder, or a model that has no such tower or pooling.
        DataError: a folder without the files of a model, or without weights as safetensors.
        DeviceError: no such device.
        NetworkError: the model is not on the disk and the hub does not answer.
    """
    sources = model_sources(settings)
    if None in sources.values():
        reporter.warn("encoder sketch: hashed words and histograms, made for demos and tests, not for research")
    loaded = {
        source: _Loaded(source, device, settings.precision, reporter)
        for source in dict.fromkeys(sources.values())
        if source is not None
    }
    text_source, image_source = sources["text"], sources["image"]
    text: TextEncoder = SketchText()
    image: ImageEncoder = SketchImage()
    if text_source is not None:
        text = _Text(loaded[text_source], settings.text_pooling, settings.max_text_length, reporter)
    if image_source is not None:
        image = _Image(loaded[image_source])
    models = {side: source or "sketch" for side, source in sources.items()}
    on_gpu = any(one.device.type == "cuda" for one in loaded.values())
    return Encoder(encoder_name(settings), text, image, models, on_gpu)


def model_sources(settings: FeatureSettings) -> dict[Side, str | None]:
    """The id or folder of each side's model; None for the sketch.

    Raises:
        UsageError: no such encoder.
    """
    name = settings.encoder
    sides: tuple[str | None, str | None]
    if name in PAIRS:
        sides = PAIRS[name]
    elif name in PRESETS:
        sides = PRESETS[name], PRESETS[name]
    elif "/" in name or "\\" in name or Path(name).is_dir() or (settings.text_model and settings.image_model):
        sides = name, name
    else:
        raise UsageError(
            f"features.encoder={name}: no such encoder",
            hint=f"take one of {', '.join([*PRESETS, *PAIRS])}, a Hugging Face id (owner/name), a folder, "
            "or --text-model with --image-model",
        )
    text, image = settings.text_model, settings.image_model
    return {
        "text": PRESETS.get(text, text) if text else sides[0],
        "image": PRESETS.get(image, image) if image else sides[1],
    }


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


_RETRIEVAL = {"BlipForImageTextRetrieval", "Blip2ForImageTextRetrieval"}
"""Joint models whose trained projections AutoModel would drop; which class a folder holds, its config says."""


class _Loaded:
    """A model on its device, once for both sides if it is joint."""

    def __init__(self, source: str, device: str, precision: str, reporter: Reporter) -> None:
        import torch
        import transformers
        from safetensors import SafetensorError

        self.source = source
        self.device = torch_device(device)
        self.precision = precision
        self.folder = model_folder(source, reporter)
        hashes = [sha256(path) for path in _weights(self.folder)]
        self.weights = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        self._reporter = reporter
        self._most: int | None = None
        try:
            with _quiet():
                config = transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
                name = next((name for name in config.architectures or () if name in _RETRIEVAL), "AutoModel")
                model, report = getattr(transformers, name).from_pretrained(
                    self.folder,
                    dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            hint = "name another model"
            if (self.folder / "open_clip_config.json").is_file():
                hint = (
                    "it is laid out for open_clip: convert it once to a SiglipModel or CLIPModel, and name that folder"
                )
            raise DataError(f"{source}: not a model that can be loaded ({reason})", hint=hint) from None
        missing = {str(key) for key in report["missing_keys"]}
        self.has_pooler = not any("pooler" in key for key in missing)
        lacking = sorted(key for key in missing if "pooler" not in key)
        if lacking:
            raise DataError(
                f"{source}: {len(lacking)} of the model's weights are not in the file, {lacking[0]} the first",
                hint="name a folder or id with complete weights",
            )
        try:
            self.model: Any = model.to(self.device).eval()
        except torch.OutOfMemoryError:
            raise self._out_of_memory() from None
        self.config: Any = model.config
        # some models keep parts of themselves in float32 whatever is asked for
        self._mixed = len({one.dtype for one in model.parameters()}) > 1
        on_gpu = self.device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def numbers(self) -> str:
        """The number format of the arithmetic, as the identity names it; TF32 is the GPU's alone."""
        return {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}[self.precision]

    def stream(self, batches: Iterable[Arrays], vectors: Callable[[dict[str, Any]], Any]) -> Iterator[Floats]:
        """Unit vectors float32 [B, F] of each batch, in order.

        On a GPU two batches are queued before the first is waited for, so that neither side idles. When memory runs
        out, the batch is halved, and stays so.

        Args:
            batches: arrays [B, …] by name.
            vectors: from tensors on the device to [B, F].

        Raises:
            DeviceError: out of memory even for one.
        """
        queued: deque[list[tuple[Any, Any]]] = deque()
        for batch in batches:
            queued.append(self._started(batch, vectors))
            if len(queued) > (2 if self._copies is not None else 0):
                yield self._finished(queued.popleft())
        while queued:
            yield self._finished(queued.popleft())

    def one(self, batch: Arrays, vectors: Callable[[dict[str, Any]], Any]) -> Floats:
        """Unit vectors float32 [B, F] of one batch."""
        return next(self.stream([batch], vectors))

    def _started(self, batch: Arrays, vectors: Callable[[dict[str, Any]], Any]) -> list[tuple[Any, Any]]:
        """The answers to one batch, in pieces, each with the event that tells when it is there (None: it is)."""
        import torch

        tensors = {key: torch.as_tensor(value) for key, value in batch.items()}
        n = len(next(iter(tensors.values())))
        pieces: list[tuple[Any, Any]] = []
        start = 0
        while start < n:
            stop = min(n, start + (self._most or n))
            try:
                pieces.append(self._answer({key: value[start:stop] for key, value in tensors.items()}, vectors))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                if stop - start == 1:
                    raise self._out_of_memory() from None
                if self._most is None:
                    self._reporter.note(
                        f"{self.source}: out of memory on {self.device} with {stop - start} at once; the batch is "
                        "halved until it fits (set features.batch_size to begin lower)"
                    )
                self._most = (stop - start + 1) // 2
            else:
                start = stop
                continue
            # outside the handler, where the failed call holds nothing any more
            if self._copies is not None:
                torch.cuda.empty_cache()
        return pieces

    def _answer(self, inputs: dict[str, Any], vectors: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
        import torch

        with torch.inference_mode(), self._arithmetic():
            if self._copies is None:
                return self._checked(vectors(inputs)).float(), None
            computing = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._copies):
                there = {key: _pinned(value).to(self.device, non_blocking=True) for key, value in inputs.items()}
            computing.wait_stream(self._copies)
            for value in there.values():
                value.record_stream(computing)
            with torch.cuda.device(self.device):
                answer = self._checked(vectors(there)).float()
                here = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
                here.copy_(answer, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(computing)
            return here, done

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        import torch

        before = torch.get_float32_matmul_precision()
        fast = self.precision == "tf32"
        torch.set_float32_matmul_precision("high" if fast else "highest")
        try:
            with (
                torch.backends.cudnn.flags(enabled=True, allow_tf32=fast),
                torch.autocast(
                    self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16" and self._mixed
                ),
            ):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _checked(self, vectors: Any) -> Any:
        if vectors is None or vectors.ndim != 2:
            raise UsageError(f"{self.source}: gives no single vector", hint="name another model for this side")
        return vectors

    @staticmethod
    def _finished(pieces: list[tuple[Any, Any]]) -> Floats:
        for _, done in pieces:
            if done is not None:
                done.synchronize()
        return normalised(np.concatenate([answer.numpy() for answer, _ in pieces]))

    def _out_of_memory(self) -> DeviceError:
        return DeviceError(
            f"{self.source}: out of memory on {self.device}, even for one text or picture at a time",
            hint="free the device's memory, take --device cpu, or try --set features.precision=bf16",
        )


def _pinned(tensor: Any) -> Any:
    return tensor if tensor.is_pinned() else tensor.pin_memory()


def _vectors(output: Any) -> Any:
    """The [B, F] tensor of a joint model's answer, which older releases give bare."""
    return getattr(output, "pooler_output", output)


@dataclass(frozen=True)
class _Tokens:
    """Texts to tokens [B, T]; goes through pickle."""

    tokenizer: Any
    length: int
    siglip: bool

    def __call__(self, batch: Sequence[str]) -> Arrays:
        tokens = self.tokenizer(
            [text.lower() for text in batch] if self.siglip else list(batch),
            padding="max_length" if self.siglip else True,
            truncation=True,
            max_length=self.length,
            return_tensors="np",
        )
        return {key: value for key, value in tokens.items() if not (self.siglip and key == "attention_mask")}


class _Text:
    """The text side of a transformers model."""

    def __init__(self, loaded: _Loaded, pooling: str, max_length: int, reporter: Reporter) -> None:
        from transformers import AutoTokenizer

        self._loaded = loaded
        model, source = loaded.model, loaded.source
        self._joint = hasattr(model, "get_text_features") or type(model).__name__ in _RETRIEVAL
        if not self._joint and (hasattr(model, "get_image_features") or _sees(loaded.config)):
            raise UsageError(f"{source}: a model without a text side", hint="name a text model with --text-model")
        try:
            with _quiet():
                tokenizer: Any = AutoTokenizer.from_pretrained(loaded.folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{source}: its tokenizer cannot be loaded ({reason})", hint="name another model") from None
        # without its files some tokenizers load all the same, and know no word
        files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
        if not any((loaded.folder / name).is_file() for name in files):
            raise DataError(
                f"{source}: no tokenizer there ({', '.join(sorted(files))})",
                hint="save the tokenizer beside the model, with save_pretrained",
            )
        # SigLIP (1 and 2) saw lower-case texts, padded on the right to their full length, without a mask, and reads
        # its last place; the tokenizer files of SigLIP 2 do not all say so
        siglip = str(loaded.config.model_type).startswith("siglip")
        if siglip:
            tokenizer.padding_side = "right"
        text_config = getattr(loaded.config, "qformer_config", getattr(loaded.config, "text_config", loaded.config))
        places = int(getattr(text_config, "max_position_embeddings", max_length))
        if text_config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"}:
            places -= int(text_config.pad_token_id) + 1  # their positions are counted from behind the padding id
        length = min(max_length, places)
        if length < max_length:
            reporter.note(f"{source} takes {places} tokens at most: texts are cut to that")
        self._tokens = _Tokens(tokenizer, length, siglip)
        self._pooling = "joint" if self._joint else self._chosen(pooling, reporter)

    def _chosen(self, pooling: str, reporter: Reporter) -> str:
        """How the tokens of a model of its own become one vector."""
        source, trained = self._loaded.source, _sentence_pooling(self._loaded.folder)
        if pooling in {"mean", "cls"}:
            return pooling
        if pooling == "auto" and trained is not None:
            reporter.note(f"{source}: a sentence-transformers model; a text's vector is its {trained} over the tokens")
            return trained
        if self._loaded.has_pooler and self._pooled_width():
            if trained is not None:
                reporter.warn(f"{source} was trained for {trained}: set features.text_pooling=auto to use it so")
            return "pooled"
        if pooling == "auto":
            reporter.note(f"{source} has no trained pooled output: a text's vector is the mean over its tokens")
            return "mean"
        raise UsageError(
            f"features.text_pooling=pooled: {source} has no trained pooled output",
            hint="take the mean over its tokens: --set features.text_pooling=mean",
        )

    def _pooled_width(self) -> int:
        widths: list[int] = []

        def look(inputs: dict[str, Any]) -> Any:
            output = self._loaded.model(**inputs)
            pooled = getattr(output, "pooler_output", None)
            widths.append(0 if pooled is None else int(pooled.shape[-1]))
            return output.last_hidden_state[:, 0]

        self._loaded.one(self._tokens(["a"]), look)
        return widths[0]

    @property
    def preparer(self) -> Callable[[Sequence[str]], Arrays]:
        """Tokens of some texts."""
        return self._tokens

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors."""
        tokens = self._tokens
        vocabulary = json.dumps(sorted(tokens.tokenizer.get_vocab().items()))
        return {
            "model": type(self._loaded.model).__name__,
            "weights": self._loaded.weights,
            "tokenizer": type(tokens.tokenizer).__name__,
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "max_length": tokens.length,
            "padding": "max_length" if tokens.siglip else "longest, masked",
            "case": "lower" if tokens.siglip else "the tokenizer's",
            "pooling": self._pooling,
            "normalised": True,
            "dtype": self._loaded.numbers,
        }

    def stream(self, batches: Iterable[Arrays]) -> Iterator[Floats]:
        """Unit vectors float32 [B, F] of each batch of tokens."""
        return self._loaded.stream(batches, self._pooled)

    def texts(self, batch: Sequence[str]) -> Floats:
        """Unit vectors float32 [B, F]."""
        return self._loaded.one(self._tokens(batch), self._pooled)

    def _pooled(self, tokens: dict[str, Any]) -> Any:
        model = self._loaded.model
        if type(model).__name__ == "BlipForImageTextRetrieval":
            return model.text_proj(model.text_encoder(**_known(tokens)).last_hidden_state[:, 0])
        if type(model).__name__ == "Blip2ForImageTextRetrieval":
            states = model.qformer(
                query_embeds=model.embeddings(input_ids=tokens["input_ids"]),
                query_length=0,
                attention_mask=tokens["attention_mask"],
            ).last_hidden_state
            return model.text_projection(states[:, 0].to(model.text_projection.weight.dtype))
        if self._joint:
            return _vectors(model.get_text_features(**tokens))
        output = model(**tokens)
        if self._pooling == "pooled":
            return output.pooler_output
        states_BTF = output.last_hidden_state
        if self._pooling == "cls":
            return states_BTF[:, 0]
        mask_BT1 = tokens["attention_mask"].unsqueeze(-1)
        return (states_BTF.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)


def _known(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """What a BLIP text tower takes of a BERT tokenizer's answer."""
    return {key: value for key, value in tokens.items() if key in {"input_ids", "attention_mask"}}


def _sees(config: Any) -> bool:
    """Whether a model of one side takes pictures."""
    return hasattr(config, "image_size") or hasattr(config, "num_channels")


def _sentence_pooling(folder: Path) -> Literal["mean", "cls"] | None:
    """How a sentence-transformers model says that it was trained; None for other models and other ways."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean" if (folder / "modules.json").is_file() else None
    try:
        pooling = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path}: not JSON", hint="fetch the model anew, or set features.text_pooling") from None
    if pooling.get("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean":
        return "mean"
    return "cls" if pooling.get("pooling_mode_cls_token") or pooling.get("pooling_mode") == "cls" else None


_PROCESSING = [
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_pad", "patch_size", "max_num_patches"),
]


@dataclass(frozen=True)
class _Processed:
    """One picture to the arrays that the model takes; goes through pickle."""

    processor: Any
    options: Mapping[str, bool]

    def __call__(self, image: Image.Image) -> Prepared:
        processed = self.processor(images=[image], return_tensors="np", **self.options)
        return {key: np.asarray(value)[0] for key, value in processed.items()}


@dataclass(frozen=True)
class _Resized:
    """What a processor that squeezes pictures to one size does to their bytes, without its detour through numpy."""

    size: tuple[int, int]
    resample: Any

    def __call__(self, image: Image.Image) -> Prepared:
        pixels = np.asarray(image.resize(self.size, self.resample))
        return {"pixel_values": np.ascontiguousarray(pixels.transpose(2, 0, 1))}


class _Image:
    """The image side of a transformers model, with the processor that needs Pillow and numpy alone."""

    def __init__(self, loaded: _Loaded) -> None:
        from transformers import AutoImageProcessor
        from transformers.image_processing_backends import PilBackend

        self._loaded = loaded
        source = loaded.source
        name = type(loaded.model).__name__
        self._joint = hasattr(loaded.model, "get_image_features") or name in _RETRIEVAL
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
        self._whole = _Processed(self._processor, {})
        self._levels, self._bytes = self._shortcut()
        self._on_device: Any = None
        self._pooled = loaded.has_pooler
        if not self._joint:
            pooled: list[bool] = []

            def look(inputs: dict[str, Any]) -> Any:
                output = loaded.model(**inputs)
                pooled.append(getattr(output, "pooler_output", None) is not None)
                return output.last_hidden_state.flatten(1)

            loaded.one(self._stacked([self.prepare(Image.new("RGB", (32, 32), "white"))]), look)
            self._pooled = self._pooled and pooled[0]

    def _shortcut(self) -> tuple[Floats | None, Callable[[Image.Image], Prepared]]:
        """What the processor makes of each of the 256 levels of each channel, float32 [3, 256], and what gives bytes.

        With both the processes hand over bytes, a quarter of the memory, and the device looks the rest up. Whether a
        processor does no more than that is tried out on pictures of noise: only equal bits count, else its own way is
        taken. (A JPEG decoded at reduced size gives other pixels, so that is never done.)
        """
        still = {"do_resize": False, "do_center_crop": False, "do_pad": False}
        rng = np.random.default_rng(0)
        shapes = ((61, 83, 3), (700, 517, 3), (40, 900, 3))
        pictures = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
        ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
        try:
            levels = _Processed(self._processor, still)(ramp)["pixel_values"]
        except (ValueError, KeyError, TypeError, IndexError):
            return None, self._whole
        if levels.shape != (3, 1, 256):
            return None, self._whole
        table: Floats = np.ascontiguousarray(levels[:, 0], dtype=np.float32)

        def same(way: Callable[[Image.Image], Prepared]) -> bool:
            for picture in pictures:
                whole, given = self._whole(picture), way(picture)
                if set(whole) != {"pixel_values"} or given["pixel_values"].dtype != np.uint8:
                    return False
                if not np.array_equal(_looked_up(table, given["pixel_values"]), whole["pixel_values"]):
                    return False
            return True

        size = getattr(self._processor, "size", None)
        if size is not None and size.height and size.width:
            direct = _Resized((size.width, size.height), self._processor.resample)
            if same(direct):
                return table, direct
        as_bytes = _Processed(self._processor, {"do_rescale": False, "do_normalize": False})
        return (table, as_bytes) if same(as_bytes) else (None, self._whole)

    @property
    def preparer(self) -> Callable[[Image.Image], Prepared]:
        """One picture as bytes where the device can do the rest, else as `prepare`."""
        return self._bytes

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
            "dtype": self._loaded.numbers,
        }

    def prepare(self, image: Image.Image) -> Prepared:
        """One picture as the arrays that the model takes."""
        return self._whole(image)

    @staticmethod
    def _stacked(batch: Sequence[Prepared]) -> Arrays:
        return {key: np.stack([one[key] for one in batch]) for key in batch[0]}

    def stream(self, batches: Iterable[Arrays]) -> Iterator[Floats]:
        """Unit vectors float32 [B, F] of each batch of pictures made ready."""
        return self._loaded.stream(batches, self._seen)

    def images(self, batch: Sequence[Prepared]) -> Floats:
        """Unit vectors float32 [B, F]."""
        return self._loaded.one(self._stacked(batch), self._seen)

    def _seen(self, inputs: dict[str, Any]) -> Any:
        import torch

        model = self._loaded.model
        pixels = inputs["pixel_values"]
        if pixels.dtype == torch.uint8:
            if self._on_device is None:
                self._on_device = torch.from_numpy(self._levels).to(pixels.device)
            pixels = _looked_up(self._on_device, pixels.int())
        inputs = inputs | {"pixel_values": pixels.to(model.dtype)}
        if type(model).__name__ == "BlipForImageTextRetrieval":
            return model.vision_proj(model.vision_model(**inputs).last_hidden_state[:, 0])
        if type(model).__name__ == "Blip2ForImageTextRetrieval":
            # a picture has one vector a query; their mean stands for it
            states = model.vision_model(**inputs).last_hidden_state
            queries = model.query_tokens.expand(len(states), -1, -1)
            answers = model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
            projected = model.vision_projection(answers.to(model.vision_projection.weight.dtype))
            return torch.nn.functional.normalize(projected.float(), dim=-1).mean(1)
        if self._joint:
            return _vectors(model.get_image_features(**inputs))
        output = model(**inputs)
        if self._pooled:
            return output.pooler_output.flatten(1)
        return self._mean(output.last_hidden_state, inputs)

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


def _looked_up(table: Any, pixels: Any) -> Any:
    """Levels [3, H, W] or [B, 3, H, W] through a table [3, 256], in numpy or torch."""
    channels = [table[channel][pixels[..., channel, :, :]] for channel in range(3)]
    if isinstance(table, np.ndarray):
        return np.stack(channels, axis=-3)
    import torch

    return torch.stack(channels, dim=-3)
